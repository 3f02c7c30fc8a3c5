"""Key neurons under each threshold rule, alone and several in one pass, against plain loops over all entries."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mui_callback import MUIProbe, MUIReport, ProbeSet
from mui_callback.probe.samples import TokenSample
from mui_callback.settings import ProbeSettings
from naive import NaiveLayer, Neuron, naive_scores
from naive_rules import naive_sets
from plain_moe import build_plain
from plain_naive import plain_scores
from tiny import build
from tiny_samples import make_samples

RULES = (
    "top_fraction=0.1",
    *("top_fraction=0.02", "topscore=0.5", "topscore=0.9", "topscore=1", "global_topk=1", "global_topk=17"),
    "global_topk=100000",
)
"""The last takes everything that there is."""
FAMILIES = ("olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss")
LISTS = ("qwen2", "gpt2", "shared_list", "expert_choice")


def measure(model: nn.Module, samples: list[TokenSample], rules: Any, **options: Any) -> MUIReport:
    probe_set = ProbeSet({"a": samples[:2], "b": samples[2:]})
    return MUIProbe(model, probe_set, rules=rules, **options).measure()


def sets(report: MUIReport, rule: str | None = None) -> list[set[Neuron]]:
    """The key neurons of each sample, by name."""
    rows = report.key_neuron_sets(rule).toarray()
    return [{tuple(report.layout.name_neuron(int(neuron))) for neuron in row.nonzero()[0]} for row in rows]


def assert_sets_of(report: MUIReport, layers: list[NaiveLayer]) -> None:
    """Those of the loops under every rule, and what is derived of them."""
    for rule in RULES:
        expected = naive_sets(layers, rule)
        assert sets(report, rule) == expected, rule
        under = report.under(rule)
        assert under.rules[0] == rule
        assert sets(under) == expected
        assert under.key_neurons("a") == expected[0] | expected[1]
        assert under.key_neurons("b") == expected[2] | expected[3]
        assert under.mui == len(set().union(*expected)) / sum(layer.n_neurons for layer in layers)
        assert under.samples.column("n_key_neurons").to_pylist() == [len(one) for one in expected]


@pytest.mark.parametrize("family", FAMILIES)
def test_several_rules_in_one_pass_equal_the_loops(family: str) -> None:
    model, samples = build(family), make_samples()
    layers, _ = naive_scores(model, family, [(s.input_ids.tolist(), s.scored.tolist()) for s in samples])
    assert_sets_of(measure(model, samples, RULES), layers)


@pytest.mark.parametrize("name", LISTS)
def test_several_rules_in_lists_of_modules_equal_the_loops(name: str) -> None:
    model, samples = build_plain(name), make_samples()
    layers, _ = plain_scores(model, name, [(s.input_ids.tolist(), s.scored.tolist()) for s in samples])
    assert_sets_of(measure(model, samples, RULES), layers)


@pytest.mark.parametrize("batch_tokens", [1, 30, 10**6])
def test_a_pass_for_each_rule_equals_one_for_all(batch_tokens: int) -> None:
    model, samples = build("qwen2_moe"), make_samples(5, (9, 30, 12, 5, 17, 8))
    rules = ("top_fraction=0.08", "top_fraction=0.1", "top_fraction=0.2", "topscore=0.7", "global_topk=9")
    together = measure(model, samples, rules, batch_tokens=batch_tokens)
    for rule in rules:
        alone = measure(model, samples, rule)
        assert (alone.key_neuron_sets() != together.key_neuron_sets(rule)).nnz == 0
        assert alone.key_neuron_sets().nnz > 0
    one, two, three = (
        together.is_key_neuron() if n == 0 else together.under(rules[n]).is_key_neuron() for n in range(3)
    )
    assert not (one & ~two).any()
    assert not (two & ~three).any()
    assert one.sum() < two.sum() < three.sum()


def test_a_sample_without_finite_scores_has_no_key_neurons_under_any_rule() -> None:
    model, samples = build("qwen2_moe"), make_samples()
    before = measure(model, samples, RULES)
    only_there = set(samples[1].input_ids[:1].tolist()) - {
        token for number, sample in enumerate(samples) if number != 1 for token in sample.input_ids.tolist()
    }
    (first,) = only_there
    with torch.no_grad():
        model.get_input_embeddings().weight[first] = math.nan
    after = measure(model, samples, RULES)
    for rule in RULES:
        found, expected = after.key_neuron_sets(rule).toarray(), before.key_neuron_sets(rule).toarray()
        assert not found[1].any()
        assert np.array_equal(np.delete(found, 1, axis=0), np.delete(expected, 1, axis=0))
        assert all(map(math.isfinite, after.under(rule).scalars().values()))


@pytest.mark.parametrize("rules", [0.001, None, ["top_fraction=0.001", 0.9]])
def test_a_number_is_no_rule(rules: Any) -> None:
    with pytest.raises(ValueError, match=r"rules: expected a rule such as .*, got (0\.001|None|0\.9)"):
        ProbeSettings(rules=rules)

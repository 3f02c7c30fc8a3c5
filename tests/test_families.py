"""Every family of the installed transformers whose language model has MoE layers, against what its source says."""

from __future__ import annotations

import pytest
import torch

from families import CANNOT_WORK, EXPECTED, build, family_names
from families_table import README, WORKING, count, model_of, probe_of, row, row_without
from mui_callback import MUIProbe, ProbeSet
from mui_callback.errors import NoExpertsError
from mui_callback.experts.discover import find_expert_layers
from tiny_samples import make_samples


@pytest.mark.parametrize("family", WORKING)
def test_every_layer_conserves_its_output(family: str) -> None:
    probe = probe_of(family)
    checked = probe.verify(rounding=1e-5)
    assert not checked.complaints
    assert checked.n_tokens == sum(int(sample.scored.sum()) for sample in make_samples())
    report = probe.measure()
    assert 0 < report.mui < 1
    assert report.not_finite == 0
    assert row(family, probe, checked) in README.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("family", [name for name in WORKING if name in EXPECTED])
def test_layers_and_experts_are_those_of_the_source(family: str) -> None:
    expected, probe = EXPECTED[family], probe_of(family)
    layers = probe.layout.layers
    assert tuple(layer.layer for layer in layers) == expected.layers
    assert {layer.n_routed for layer in layers} == {expected.n_routed}
    assert {layer.routed_width for layer in layers} == {expected.width}
    assert {layer.shared_widths for layer in layers} == {expected.shared}
    for check in probe.verify().layers:
        if family == "longcat_flash":  # some tokens go to experts that pass them on
            assert 0 < check.experts_per_token < expected.top_k
        else:
            assert check.experts_per_token == expected.top_k


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2_moe", "gemma4", "llama4", "jamba", "switch_transformers"])
def test_dense_layers_are_left_out_unless_asked_for(family: str) -> None:
    model = model_of(family)
    moe, every = find_expert_layers(model), find_expert_layers(model, dense=True)
    n_layers = 4 if EXPECTED[family].layers[-1] == 3 else 3
    assert len({layer.shape.layer for layer in every}) == len(every) == n_layers
    assert [layer.shape for layer in every if layer.shape.n_routed > 1] == [layer.shape for layer in moe]


def test_no_family_is_forgotten() -> None:
    """A family that neither works nor is listed with the reason would be missing in the table."""
    assert set(EXPECTED) | set(CANNOT_WORK) >= set(family_names()), "new in this transformers: say what is expected"
    lines = README.read_text(encoding="utf-8").splitlines()
    assert [family for family in CANNOT_WORK if row_without(family) not in lines] == []
    assert count() in lines


def test_doge_is_refused() -> None:
    """Rows of an embedding, picked by the scores of other tokens, are no experts that could be measured."""
    with pytest.raises(NoExpertsError):
        find_expert_layers(build("doge"))


@pytest.mark.parametrize(
    "family", ["gpt_oss", "llama4", "longcat_flash", "dbrx", "jetmoe", "muse_spark", "gemma4", "switch_transformers"]
)
@pytest.mark.parametrize("batch_tokens", [1, 10**6])
def test_batch_size_does_not_matter(family: str, batch_tokens: int) -> None:
    model = model_of(family)
    probe_set = ProbeSet({"a": make_samples(lengths=(6, 9, 14, 23))})
    reference = MUIProbe(model, probe_set, rules="top_fraction=0.05", batch_tokens=60).measure()
    report = MUIProbe(model, probe_set, rules="top_fraction=0.05", batch_tokens=batch_tokens).measure()
    assert report.key_neurons() == reference.key_neurons()
    assert (report.counts.routed == reference.counts.routed).all()


@pytest.mark.parametrize("family", ["gpt_oss", "llama4", "nemotron_h", "gemma4", "axk1", "dbrx"])
def test_half_precision(family: str) -> None:
    checked = MUIProbe(build(family).to(torch.bfloat16), ProbeSet({"a": make_samples()})).verify(rounding=0.02)
    assert not checked.complaints

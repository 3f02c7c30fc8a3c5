"""`MUIReport` from counts that are made by hand, against plain sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from made import LAYOUT, make_report
from mui_callback import MUIReport, report_file
from mui_callback.errors import MUIError
from mui_callback.metrics import key_sets

neurons = st.sets(st.integers(0, LAYOUT.n_neurons - 1), max_size=9)
tasks_and_sets = st.lists(st.tuples(st.integers(0, 1), neurons), max_size=6)


def expert_of(neuron: int) -> int:
    ends = np.cumsum(LAYOUT.width).tolist()
    return next(expert for expert, end in enumerate(ends) if neuron < end)


@given(tasks_and_sets, st.integers(1, 7))
def test_unions_and_activated_experts_are_those_of_plain_sets(samples: list[tuple[int, set[int]]], block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(key_sets, "_PAIRS_AT_ONCE", block)
        report = make_report([one for _, one in samples], [task for task, _ in samples])
        found = {None: report.pooled, **report.tasks}
        for name, task in found.items():
            own = [one for number, one in samples if name in (None, report.task_names[number])]
            union = set().union(*own)
            assert set(np.flatnonzero(report.is_key_neuron(name)).tolist()) == union
            assert report.key_neurons(name) == {LAYOUT.name_neuron(neuron) for neuron in union}
            owners = [expert_of(neuron) for neuron in union]
            assert task.key_neurons.tolist() == [owners.count(expert) for expert in range(LAYOUT.n_experts)]
            activated = [{expert_of(neuron) for neuron in one} for one in own]
            assert task.activated.tolist() == [
                sum(expert in experts for experts in activated) for expert in range(LAYOUT.n_experts)
            ]
            assert task.n_samples == len(own)
            assert task.mui == (len(union) / LAYOUT.n_neurons if own else None)


@given(tasks_and_sets)
def test_the_sets_are_a_sparse_matrix(samples: list[tuple[int, set[int]]]) -> None:
    report = make_report([one for _, one in samples])
    sets = report.key_neuron_sets()
    assert sets.shape == (len(samples), LAYOUT.n_neurons)
    assert not sets.nnz or np.shares_memory(sets.indices, report.counts.key_sets[0].neuron)
    assert sets.dtype == np.uint8
    dense = sets.toarray()
    for row, (_, one) in zip(dense, samples, strict=True):
        assert row.tolist() == [int(neuron in one) for neuron in range(LAYOUT.n_neurons)]


def test_another_rule_of_the_same_pass() -> None:
    report = make_report([{0, 1}, {1, 2}], by_rule={"topscore=0.9": [{5}, set()], "global_topk=2": [{7, 8}, {9, 25}]})
    assert report.rules == ("top_fraction=0.001", "topscore=0.9", "global_topk=2")
    other = report.under("global_topk=2")
    assert (report.mui, other.mui, report.under("topscore=0.9").mui) == (3 / 26, 4 / 26, 1 / 26)
    assert other.rules == ("global_topk=2", "top_fraction=0.001", "topscore=0.9")
    assert other.under("top_fraction=0.0010").mui == report.mui  # the same rule in other words
    assert report.under("top_fraction=0.001").rules == report.rules
    assert other.key_neuron_sets().indices.tolist() == [7, 8, 9, 25]
    assert report.key_neuron_sets("global_topk=2").indices.tolist() == [7, 8, 9, 25]
    assert other.counts.loss is report.counts.loss
    with pytest.raises(KeyError, match=r"no rule 'topscore=0.5' in this report; it has top_fraction=0.001, topscore"):
        report.under("topscore=0.5")
    with pytest.raises(ValueError, match="expected a rule such as"):
        report.key_neuron_sets("nonsense")


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(KeyError, match="no task 'c' in this report; it has a, b"):
        make_report([set()]).is_key_neuron("c")


def test_a_report_survives_a_file(tmp_path: Path) -> None:
    report = make_report([{0, 1}, set(), {25}], [0, 0, 1], by_rule={"topscore=0.9": [{5}, {7}, set()]})
    report.save(tmp_path / "r.mui")
    loaded = MUIReport.load(tmp_path / "r.mui")
    assert loaded.settings == report.settings
    for found, expected in zip(loaded.counts.key_sets, report.counts.key_sets, strict=True):
        assert found.neuron.dtype == np.int32
        assert found.neuron.tolist() == expected.neuron.tolist()
        assert found.end.tolist() == expected.end.tolist()
    assert loaded.scalars() == report.scalars()
    assert loaded.counts.sample_mass.tolist() == report.counts.sample_mass.tolist()


def test_a_report_of_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.mui"
    with monkeypatch.context() as patch:
        patch.setattr(report_file, "_FORMAT", "mui-report-2")
        make_report([{0}]).save(path)
    with pytest.raises(MUIError, match=r"r\.mui: expected format 'mui-report-3', got 'mui-report-2'"):
        MUIReport.load(path)

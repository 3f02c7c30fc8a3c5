"""Estimates and intervals of a report, against its metrics and plain loops over samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from made import LAYOUT, make_report
from mui_callback import MUIReport
from mui_callback.layout import ExpertLayout, LayerShape
from mui_callback.metrics.catalogue import CATALOGUE
from mui_callback.sample_results import ESTIMATED

NO_SHARED = ExpertLayout([LayerShape(0, "a", 3, 6)])


def random_report(seed: int, n: int = 12, layout: ExpertLayout = LAYOUT, **changes: Any) -> MUIReport:
    """Samples of two tasks that differ in all that is counted; a few have no bytes, no choices or no tokens."""
    rng = np.random.default_rng(seed)
    n_tokens = rng.integers(0, 9, n)
    sets = [set(rng.integers(0, layout.n_neurons, 6).tolist()) if tokens else set() for tokens in n_tokens]
    has_choices = rng.random(n) < 0.7
    choices = np.flatnonzero(np.repeat(has_choices, 2))
    task = rng.integers(0, 2, n)
    sample_mass = rng.random((n, 2)) * (n_tokens > 0)[:, None] * [1, layout.is_shared.any()]
    mass = np.zeros((2, layout.n_experts))
    for of_expert, kind in ((~layout.is_shared, 0), (layout.is_shared, 1)):
        for number in range(2):
            mass[number, of_expert] = sample_mass[task == number, kind].sum() / max(of_expert.sum(), 1)
    table = {
        "n_tokens": n_tokens,
        "n_bytes": np.where(rng.random(n) < 0.3, -1, n_tokens * 3),
        "answer": np.where(has_choices, rng.integers(0, 2, n), -1),
        "choice_sample": choices // 2,
        "choice_length": rng.integers(1, 5, len(choices)),
    }
    counts = {
        "loss": rng.random(n) * n_tokens,
        "correct": rng.binomial(n_tokens, 0.5),
        "choice_loss": rng.random(len(choices)) * 5,
        "sample_mass": sample_mass,
        "mass": mass,
    }
    table |= changes.pop("table", {})
    return make_report(sets, task.tolist(), layout=layout, table=table, **{**counts, **changes})


@given(st.integers(0, 10**6), st.integers(0, 9), st.sampled_from([LAYOUT, NO_SHARED]))
@settings(deadline=None)
def test_an_estimate_has_the_value_of_the_metric(seed: int, n: int, layout: ExpertLayout) -> None:
    report = random_report(seed, n, layout)
    for name, task in ((None, report.pooled), *report.tasks.items()):
        for metric in ESTIMATED:
            found = report.estimate(metric, name)
            expected = getattr(task, metric)
            assert (found is None) == (expected is None), metric
            if found is not None:
                assert found.value == pytest.approx(expected), metric
                assert found.influence.shape == (task.n_samples,)
                assert found.influence.sum() == pytest.approx(0, abs=1e-9)


def test_the_influence_is_in_the_order_of_the_tasks_samples() -> None:
    report = make_report([{0}, {1, 2, 3}, {0, 4, 5}, {1}, set()], [0, 1, 0, 1, 1])
    # without the sample: 0, 2; 2 of 3 neurons of the first task are the second sample's own
    first, second = report.estimate("mui", "a"), report.estimate("mui", "b")
    assert first is not None
    assert second is not None
    assert first.influence * LAYOUT.n_neurons == pytest.approx(np.array([0, 2]) - 1)
    assert second.influence * LAYOUT.n_neurons == pytest.approx(np.array([2, 0, 0]) - 2 / 3)
    with pytest.raises(KeyError, match="no task 'c'"):
        report.estimate("mui", "c")
    with pytest.raises(KeyError, match="no error bars for 'expert_gini'; the metrics that have them are mui, loss"):
        report.estimate("expert_gini")  # type: ignore[arg-type]


def test_an_interval_is_that_of_samples_drawn_anew() -> None:
    report = random_report(1, 40)
    found = report.intervals("a", level=0.9, replicates=400, seed=3)
    assert set(found) == set(ESTIMATED)
    own = np.flatnonzero(report.sample_table.task == 0)
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(4000):
        drawn = rng.choice(own, len(own))
        losses.append(report.counts.loss[drawn].sum() / report.sample_table.n_tokens[drawn].sum())
    ends = np.quantile(losses, [0.05, 0.95])
    interval = found["loss"]
    assert interval is not None
    assert interval.level == 0.9
    assert [interval.low, interval.high] == pytest.approx(ends, abs=0.15 * (ends[1] - ends[0]))


def test_intervals_hold_the_value_and_stay_within_what_is_possible() -> None:
    ranges = {metric.name: metric for metric in CATALOGUE}
    for seed in range(20):
        report = random_report(seed, 5)
        for metric, interval in report.intervals().items():
            value = getattr(report.pooled, metric)
            if interval is not None:
                assert interval.low <= value <= interval.high
                assert interval.low >= ranges[metric].low
                assert interval.high <= (ranges[metric].high or np.inf)


def test_intervals_depend_on_the_seed_alone() -> None:
    report = random_report(2, 30)
    assert report.intervals() == report.intervals()
    assert report.intervals(seed=1) != report.intervals()
    assert report.intervals(metrics=("loss",)) == {"loss": report.intervals()["loss"]}
    again = make_report([set()] * 30)  # of another step: nothing is kept between reports
    assert again.intervals()["mui"] is None
    assert random_report(2, 30).scalars() == report.scalars()


def test_the_ends_are_logged() -> None:
    report = random_report(3, 30)
    scalars = report.scalars()
    for metric in ("mui", "loss"):
        interval = report.intervals()[metric]
        assert interval is not None
        assert (scalars[f"mui/{metric}_low"], scalars[f"mui/{metric}_high"]) == (interval.low, interval.high)
        assert f"mui/a/{metric}_low" not in scalars


def test_arguments_out_of_range() -> None:
    report = random_report(4)
    with pytest.raises(ValueError, match=r"level: expected a number in \(0, 1\), got 1"):
        report.intervals(level=1)
    with pytest.raises(ValueError, match="replicates: expected a positive number, got 0"):
        report.intervals(replicates=0)

"""What is kept of points: small, the same after a checkpoint, and as good for the trend of a run."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mui_callback.metrics.phases import PhaseRule, Point, Score, call_phase
from mui_callback.metrics.resampling import Estimate, ratio_of_sums
from mui_callback.metrics.trajectory import (
    Trajectories,
    TrajectoryPoint,
    from_list,
    kept,
    phase_at,
    pruned,
    to_list,
)


def mean(value_N: np.ndarray, is_counted_N: np.ndarray | None = None) -> Estimate:
    count_N = np.ones(len(value_N)) if is_counted_N is None else is_counted_N.astype(float)
    found = ratio_of_sums(value_N * count_N, count_N)
    assert found is not None
    return found


def point(performance: float, mui: float = 0.1, axis: str = "-loss", n: int = 4) -> TrajectoryPoint:
    return TrajectoryPoint(axis, kept(mean(performance + np.arange(n))), Score(mui))


# What is kept


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9), st.sampled_from([1, -1]))
def test_few_samples_are_kept_as_they_are(values: list[float], sign: int) -> None:
    one = mean(np.array(values))
    found = kept(one, sign)
    assert isinstance(found, Estimate)
    assert found.value == sign * one.value
    assert found.influence == pytest.approx(sign * one.influence, rel=1e-6, abs=1e-30)


def test_samples_that_do_not_count_are_left_out() -> None:
    is_counted = np.array([True, False, True, True, False])
    found = kept(mean(np.array([3.0, 9.0, 1.0, 2.0, 9.0]), is_counted))
    assert isinstance(found, Estimate)
    assert found.n_samples == 3
    assert found.influence == pytest.approx(np.array([1.0, -1.0, 0.0]) / 3)


def test_many_samples_are_added_up_in_groups() -> None:
    value_N = np.random.default_rng(0).normal(size=1300)
    found = kept(mean(value_N))
    assert isinstance(found, Estimate)
    assert len(found.influence) == 512
    influence = (value_N - value_N.mean()) / 1300
    for group in (0, 100, 511):
        members = [i for i in range(1300) if i % 512 == group]
        assert found.influence[group] == pytest.approx(sum(influence[i] for i in members), rel=1e-6)


def test_the_standard_error_of_groups_is_right_on_average() -> None:
    rng = np.random.default_rng(1)
    errors = [kept(mean(rng.normal(size=2000))).standard_error for _ in range(200)]
    # each is off by some sqrt(2 / 511) / 2 = 3 %, their mean by 0.2 %
    assert np.mean(errors) * 2000**0.5 == pytest.approx(1, abs=0.01)
    assert np.std(errors) * 2000**0.5 == pytest.approx(0.031, abs=0.008)


def test_a_score_is_kept_with_its_error() -> None:
    assert kept(Score(0.5, 0.1), -1) == Score(-0.5, 0.1)


def same(first: Point, second: Point) -> bool:
    if isinstance(first, Estimate) and isinstance(second, Estimate):
        return first.value == second.value and np.array_equal(first.influence, second.influence)
    return first == second


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=700), st.one_of(st.none(), st.floats(0, 10)))
def test_a_checkpoint_holds_it_to_the_bit(values: list[float], error: float | None) -> None:
    one = TrajectoryPoint("benchmark/a", Score(values[0], error), kept(mean(np.array(values))))
    two = TrajectoryPoint("-loss", kept(mean(np.array(values)), -1), kept(mean(np.array(values))))
    trajectories: Trajectories = {None: {3: one}, "task": {3: two, 12: one}}
    found = from_list(json.loads(json.dumps(to_list(trajectories))))
    assert {task: list(points) for task, points in found.items()} == {None: [3], "task": [3, 12]}
    for task, points in trajectories.items():
        for step, kept_point in points.items():
            assert found[task][step].axis == kept_point.axis
            assert same(found[task][step].performance, kept_point.performance)
            assert same(found[task][step].mui, kept_point.mui)


def test_memory_is_bounded_whatever_the_probe_set() -> None:
    small, large = (len(json.dumps(point(0, n=n).to_dict())) for n in (512, 100_000))
    assert large < small + 20 < 3000


# The call


def test_the_phase_is_called_from_the_last_points_up_to_the_step() -> None:
    points = {step: point(value, 0.1 * value) for step, value in [(0, 5.0), (10, 1.0), (20, 2.0), (30, 3.5), (40, 0.0)]}
    found = phase_at(points, 30, PhaseRule(window=3))
    assert found is not None
    steps = [10, 20, 30]
    expected = call_phase(
        steps, [points[at].performance for at in steps], [points[at].mui for at in steps], PhaseRule(window=3)
    )
    assert found.call == expected
    assert found.point is points[30]
    assert phase_at(points, -1, PhaseRule()) is None


@pytest.mark.parametrize("other", [point(2, axis="benchmark/x"), point(2, n=5)])
def test_a_point_of_another_kind_ends_the_window(other: TrajectoryPoint) -> None:
    points = {0: point(0.0), 1: point(1.0), 2: other, 3: point(3.0), 4: point(4.0), 5: point(5.0)}
    found = [phase_at(points, step, PhaseRule(window=3)) for step in range(6)]
    assert [one.call.first_step for one in found if one] == [0, 0, 2, 3, 3, 3]
    assert [one.call.reason == "fewer than 3 points" for one in found if one] == [True] * 5 + [False]


@given(
    st.sets(st.integers(0, 60), min_size=1),
    st.integers(0, 60),
    st.integers(3, 6),
    st.lists(st.integers(0, 60), max_size=9),
)
def test_what_is_pruned_is_not_missed(steps: set[int], step: int, window: int, later: list[int]) -> None:
    """Calls from a step on are the same as with all points, where the points after it were all made before."""
    points = {at: point(at % 7, at % 5) for at in steps}
    small = pruned({None: dict(points)}, step, window)
    assert len(small[None]) <= 2 * window
    rule = PhaseRule(window=window)
    last = max(*steps, step)
    for at in (step, last, *(last + 1 + more for more in later)):
        whole, part = phase_at(points, at, rule), phase_at(small[None], at, rule)
        assert (whole and whole.call) == (part and part.call)

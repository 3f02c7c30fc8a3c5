"""When to probe: the predicate alone, and the pace that a budget leaves."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mui_callback.monitoring.schedule import Schedule
from mui_callback.spent import Spent


def due(schedule: Schedule, n: int = 40) -> list[int]:
    return [step for step in range(n) if schedule.is_due(step)]


def test_every_so_many_steps_and_before_the_first() -> None:
    assert due(Schedule(every=15)) == [0, 15, 30]
    assert due(Schedule(every=15, at_start=False)) == [15, 30]


def test_at_the_end() -> None:
    assert Schedule(every=15).is_due(38, last=True)
    assert not Schedule(every=15, at_end=False).is_due(38, last=True)
    assert Schedule(every=15, at_end=False).is_due(30, last=True)


def test_named_steps() -> None:
    assert due(Schedule(every=None, at=[7, 3])) == [0, 3, 7]
    assert due(Schedule(every=20, at=[0, 3], at_start=False)) == [0, 3, 20]


def test_powers_of_two_up_to_the_regular_steps() -> None:
    assert due(Schedule(every=10, warmup=True)) == [0, 1, 2, 4, 8, 10, 20, 30]
    assert due(Schedule(every=16, warmup=True)) == [0, 1, 2, 4, 8, 16, 32]
    assert due(Schedule(every=None, warmup=True), 5000) == [0, *(2**i for i in range(9))]


def test_on_evaluation() -> None:
    assert not Schedule(every=15).is_due(7, evaluated=True)
    assert Schedule(every=15, on_evaluation=True).is_due(7, evaluated=True)


def test_auto_asks_for_no_regular_steps_of_itself() -> None:
    assert due(Schedule()) == [0]


@pytest.mark.parametrize("every", [0, -1, 2.5, True, "often"])
def test_every_says_what_it_expects(every: Any) -> None:
    with pytest.raises(ValueError, match="every: expected a positive number of optimizer steps, 'auto' or None, got"):
        Schedule(every=every)


@pytest.mark.parametrize("budget", [0, 1, -0.1, "1 %", None])
def test_budget_says_what_it_expects(budget: Any) -> None:
    with pytest.raises(ValueError, match="budget: expected a share of the training time, between 0 and 1, got"):
        Schedule(budget=budget)


@pytest.mark.parametrize("at", [[-1], [1.5], ["3"], "12", [True]])
def test_at_says_what_it_expects(at: Any) -> None:
    with pytest.raises(ValueError, match="at: expected a collection of step numbers, got"):
        Schedule(at=at)


# The pace of "auto", in a world without a clock


def simulate(
    schedule: Schedule, n_steps: int, step_seconds: float, probe_seconds: float, first_probe: float | None = None
) -> tuple[list[int], Spent]:
    """The steps at which a run is probed, and what it has spent at the end."""
    probing, last, probes, look = 0.0, None, [], 0
    for step in range(n_steps + 1):
        training = step * step_seconds
        spent = Spent(step, training, probing, last)
        is_due = schedule.is_due(step, last=step == n_steps)
        if step == 0 or is_due or step >= look:
            if is_due or (step > 0 and step >= look and schedule.affords(spent)):
                probes.append(step)
                last = first_probe if first_probe is not None and len(probes) == 1 else probe_seconds
                probing += last
            look = schedule.next_look(step, Spent(step, training, probing, last))
            assert look > step
    return probes, Spent(n_steps, n_steps * step_seconds, probing, last)


@given(
    budget=st.floats(0.001, 0.2),
    step_seconds=st.floats(0.01, 5),
    cost_in_steps=st.floats(0.05, 100),
)
def test_auto_stays_within_the_budget_and_uses_it(budget: float, step_seconds: float, cost_in_steps: float) -> None:
    n_steps = 4000
    schedule = Schedule(budget=budget)
    probes, spent = simulate(schedule, n_steps, step_seconds, cost_in_steps * step_seconds)
    assert spent.overhead is not None
    affordable = budget * n_steps / cost_in_steps
    assert len(probes) <= max(affordable + 1e-6, 2)  # those at the start and at the end are made in any case
    if 20 < affordable < 200:
        # The interval is a round number, up to 2.5 times what would just do; 10 steps at least pass at first.
        assert len(probes) > min(affordable / 2.6, n_steps) - 12


@given(cost_in_steps=st.floats(0.05, 100))
def test_auto_probes_at_multiples_of_a_round_number(cost_in_steps: float) -> None:
    probes, _ = simulate(Schedule(), 30_000, 0.1, cost_in_steps * 0.1)
    probes = [step for step in probes[1:-1] if step > 15_000]  # from 10,000 on, 0.5 % of the steps is more than 50
    exact = 100 * cost_in_steps
    interval = next(
        digit * 10**power for power in range(6) for digit in (1, 2, 5) if digit * 10**power >= exact * (1 - 1e-9)
    )
    assert all(step % interval == 0 for step in probes)


def test_a_slow_first_probe_is_paid_for_and_then_forgotten() -> None:
    usual, _ = simulate(Schedule(), 60_000, 0.1, 1.0)
    probes, spent = simulate(Schedule(), 60_000, 0.1, 1.0, first_probe=4.0)
    assert spent.overhead is not None
    assert spent.overhead <= 0.01
    # 4 s for it, 4 for the next and 4 for the last have to be there first: 12,000 steps, and the pace is 5000.
    assert probes[:3] == [0, 15_000, 16_000]
    assert len([step for step in usual if step >= 15_000]) == len(probes) - 1


def test_auto_without_a_first_point_learns_what_a_probe_costs() -> None:
    probes, _ = simulate(Schedule(at_start=False), 20_000, 0.1, 1.0)
    assert probes[0] == 100
    assert len(probes) > 8


def test_auto_does_not_fill_the_tracker_with_points_that_cost_nothing() -> None:
    probes, _ = simulate(Schedule(), 1_000_000, 0.1, 1e-6)
    assert 1000 < len(probes) < 2500
    gaps = [(b - a) / a for a, b in pairwise(probes[:-1]) if a > 1000]
    assert min(gaps) > 0.0049
    assert max(gaps) < 0.02


def test_auto_leaves_room_for_the_last_probe() -> None:
    _, spent = simulate(Schedule(), 2001, 0.1, 1.0)
    assert spent.overhead is not None
    assert spent.overhead <= 0.01

"""The benchmarks of a run that is under way: when they are due, and which of them are given up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from mui_callback.benchmarks.base import Benchmark
from mui_callback.benchmarks.run import BenchmarkFailure, run_benchmarks
from mui_callback.forgiving import warn
from mui_callback.metrics.phases import Point
from mui_callback.monitoring.schedule import Schedule
from mui_callback.parallel.processes import Processes
from mui_callback.probe.run import MUIProbe

BenchmarksEvery = int | Literal["probe"]
_GIVE_UP_AFTER = 3
"""Failures in a row after which a benchmark is run no more."""


@dataclass(frozen=True)
class BenchmarkResults:
    """Of all that were run at one step."""

    scores: Mapping[str, Point] = field(default_factory=dict)
    failures: Sequence[BenchmarkFailure] = ()

    @property
    def were_run(self) -> bool:
        """Whether there was anything to run."""
        return bool(self.scores or self.failures)


class BenchmarkRuns:
    """Runs benchmarks on the model of a probe, with each probe or at an interval of their own.

    In a distributed run every process has one and calls it in the same way, and knows the same results.

    Args:
        benchmarks: what is run.
        every: ``"probe"``: with each probe; or optimizer steps between runs, the first and the last step being as in
            `schedule`.
        schedule: of the probe.
        step: optimizer steps done.
        processes: those of the run.

    Raises:
        ValueError: `every` is out of its range.
    """

    def __init__(
        self,
        benchmarks: Sequence[Benchmark],
        every: BenchmarksEvery,
        schedule: Schedule,
        step: int,
        processes: Processes,
    ) -> None:
        self.benchmarks = tuple(benchmarks)
        self._schedule = own_schedule(every, schedule)
        self._processes = processes
        self._step = step
        self._due_at: int | None = None
        self._ran_at: int | None = None
        self._failures_in_a_row = dict.fromkeys(range(len(self.benchmarks)), 0)

    @property
    def go_on(self) -> bool:
        """Whether one is left that is not given up."""
        return bool(self._failures_in_a_row)

    @property
    def have_own_interval(self) -> bool:
        """Whether a probe may be made without them."""
        return self._schedule is not None

    def are_due(self, step: int, *, last: bool) -> bool:
        """Whether they are to be run at this step in any case, so that a probe has to be made."""
        previous, self._step = self._step, step
        if self._schedule is None or not self.go_on:
            return False
        if self._schedule.is_due(step, previous=previous, last=last):
            self._due_at = step
        return step == self._due_at != self._ran_at

    def run(self, probe: MUIProbe, step: int) -> BenchmarkResults:
        """Run those that are not given up; nothing at a step at which they are not due, or were run before.

        Raises:
            InterruptedPassError: see `run_benchmarks`, as the following.
            DesynchronizedError: …
        """
        is_due = self._schedule is None or step == self._due_at
        if not is_due or step == self._ran_at or not self.go_on:
            return BenchmarkResults()
        self._ran_at = step
        numbers = tuple(self._failures_in_a_row)
        scores, failures = run_benchmarks(
            [self.benchmarks[number] for number in numbers],
            probe.model,
            step,
            processes=self._processes,
            shards=probe.shards,
        )
        self._count({numbers[failure.number]: failure for failure in failures}, step)
        return BenchmarkResults(scores, failures)

    def _count(self, failures: Mapping[int, BenchmarkFailure], step: int) -> None:
        for number in tuple(self._failures_in_a_row):
            failure = failures.get(number)
            n_failures = self._failures_in_a_row[number] + 1 if failure else 0
            self._failures_in_a_row[number] = n_failures
            if failure and n_failures < _GIVE_UP_AFTER:
                warn(f"MUI at step {step}: {failure}. Training goes on.")
            elif failure:
                del self._failures_in_a_row[number]
                warn(f"MUI at step {step}: {failure}, {n_failures} in a row; it is run no more, training goes on.")


def own_schedule(every: object, schedule: Schedule) -> Schedule | None:
    """When benchmarks are run; None with each probe.

    Raises:
        ValueError: `every` is neither a positive number of steps nor ``"probe"``.
    """
    if every == "probe":
        return None
    try:
        if every in ("auto", None):
            raise ValueError
        return replace(schedule, every=every, at=(), warmup=False, on_evaluation=False)  # type: ignore[arg-type]
    except ValueError:
        raise ValueError(
            f"benchmarks_every: expected a positive number of optimizer steps or 'probe', got {every!r}"
        ) from None

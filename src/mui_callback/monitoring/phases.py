"""The phases of a run that is under way: at each point, per task and for all tasks pooled."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from mui_callback.forgiving import warn
from mui_callback.metrics.catalogue import key
from mui_callback.metrics.phases import Phase, PhaseRule, Point
from mui_callback.metrics.trajectory import TaskPhase, Trajectories, TrajectoryPoint, kept, phase_at, pruned
from mui_callback.monitoring.performance_axis import from_probe, from_score, score_of, signed
from mui_callback.report import MUIReport

logger = logging.getLogger(__name__)

_OF_BENCHMARK = "benchmark/"
_MISSES = 3
"""Runs of the benchmarks in a row without a task's score after which it is waited for no more."""


class Phases:
    """Calls the phase of each task from the points that it is told of and those before.

    The performance of a task is a benchmark's score if there is one that belongs to it, from the first time that there
    is. At points that have none then no phase is called, until the benchmarks are given up or were run three times
    without this score. Otherwise it is what the probe has measured; see `mui_callback.monitoring.performance_axis`.
    Where it changes from one to the other, the window begins anew.

    Args:
        rule: for all tasks.
        performance: names of scores by task, where they do not follow from the task's name.
        trajectories: the points before; points are added to it, and those that no call can need are taken out.
        is_main: whether this process says what changes.
    """

    def __init__(
        self, rule: PhaseRule, performance: Mapping[str | None, str], trajectories: Trajectories, *, is_main: bool
    ) -> None:
        self.rule = rule
        self.performance = performance
        self.trajectories = trajectories
        self._is_main = is_main
        self._misses: dict[str | None, int] = {}
        self._warned_of: set[str] = set()

    def at(
        self, step: int, report: MUIReport, results: Mapping[str, Point], *, were_run: bool, more_to_come: bool
    ) -> dict[str | None, TaskPhase]:
        """The phases at a point; told of it again with more results, those that depend on them.

        Args:
            step: optimizer steps done.
            report: of the probe at this step.
            results: scores of the benchmarks that were run at this step.
            were_run: whether any were, also if they failed.
            more_to_come: whether there are benchmarks that will be run again.
        """
        called: dict[str | None, TaskPhase] = {}
        self._look_for_given(results)
        for task in (None, *report.task_names):
            points = self.trajectories.setdefault(task, {})
            score = score_of(task, self.performance, results)
            self._misses[task] = 0 if score is not None else self._misses.get(task, 0) + were_run
            waits = more_to_come and _is_benchmarked(points) and self._misses[task] < _MISSES
            point = self._point(task, report, results, score, waits=waits)
            if point is None or (step in points and points[step].axis == point.axis):
                continue
            before = phase_at(points, step, self.rule)
            points[step] = point
            now = phase_at(points, step, self.rule)
            assert now is not None
            called[task] = now
            self._say(task, step, before.call.phase if before else Phase.UNDECIDED, now)
        self.trajectories.update(pruned(self.trajectories, step, self.rule.window))
        return called

    def _point(
        self, task: str | None, report: MUIReport, results: Mapping[str, Point], score: str | None, *, waits: bool
    ) -> TrajectoryPoint | None:
        mui = report.estimate("mui", task)
        if mui is None:
            return None
        if score is not None:
            return TrajectoryPoint(*from_score(score, results), kept(mui))
        measured = None if waits else from_probe(report, task)
        return None if measured is None else TrajectoryPoint(*measured, kept(mui))

    def _look_for_given(self, results: Mapping[str, Point]) -> None:
        for task, score in self.performance.items():
            name, _ = signed(score)
            if results and name not in results and name not in self._warned_of:
                self._warned_of.add(name)
                if self._is_main:
                    warn(
                        f"MUI: there is no score {name!r} of a benchmark, which is to be the performance of "
                        f"{'all tasks' if task is None else repr(task)}; there are {', '.join(results)}."
                    )

    def _say(self, task: str | None, step: int, before: Phase, now: TaskPhase) -> None:
        if self._is_main and now.call.phase is not before:
            why = "" if now.call.reason is None else f" ({now.call.reason})"
            logger.info(
                "MUI: %s from %s to %s at step %d%s",
                "all tasks" if task is None else f"task {task!r}",
                before.value,
                now.call.phase.value,
                step,
                why,
            )


def phase_scalars(phases: Mapping[str | None, TaskPhase]) -> dict[str, float]:
    """The codes of phases by key."""
    return {key("phase", task): float(one.call.phase.code) for task, one in phases.items()}


def _is_benchmarked(points: Mapping[int, TrajectoryPoint]) -> bool:
    """Whether the performance at the latest point is a benchmark's score."""
    return bool(points) and points[max(points)].axis.removeprefix("-").startswith(_OF_BENCHMARK)

"""The way of each model in the plane of performance and MUI: of each task, of all pooled, and of their mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mui_callback.html_report.measured import Measured
from mui_callback.html_report.progress import Progress
from mui_callback.metrics.phases import Phase, PhaseRule, Point, Score
from mui_callback.metrics.resampling import Estimate
from mui_callback.metrics.trajectory import TaskPhase, Trajectory, TrajectoryPoint, phase_at
from mui_callback.pictures.paths import Path, PathPoint
from mui_callback.trajectory.records import Row, Study

POOLED, MEAN = "all tasks pooled", "mean over the tasks"


@dataclass(frozen=True)
class Route:
    """One task of one model, or several together."""

    model: str
    name: str
    is_task: bool
    path: Path
    phases: tuple[TaskPhase | None, ...]
    """At each point of the path."""

    @property
    def turns(self) -> list[tuple[PathPoint, Phase, Phase]]:
        """Where a phase that was called is another one than that called before it."""
        decided = [point for point in self.path.points if point.phase is not Phase.UNDECIDED]
        pairs = pairwise(decided)
        return [(after, before.phase, after.phase) for before, after in pairs if before.phase is not after.phase]


def routes_of(
    study: Study, model: str, found: Sequence[Measured], progress: Progress, rule: PhaseRule
) -> tuple[Route, ...]:
    """The mean over the tasks and all pooled, where there are several, and each task; those without a point are left
    out.

    Args:
        study: as it is on the disk.
        model: one of its models.
        found: its checkpoints.
        progress: what they are counted in.
        rule: of the phases.
    """
    points = {task: _by_slug(found, task) for task in (*study.tasks, None)}
    steps = _steps(study, model, found)
    tasks = [task for task in study.tasks if points[task]]
    routes = [_route(model, task, True, found, points[task], steps, progress, rule) for task in tasks]
    if len(tasks) > 1:
        mean = _mean([points[task] for task in tasks])
        together = ((MEAN, mean), (POOLED, points[None]))
        routes = [
            *(_route(model, name, False, found, of, steps, progress, rule) for name, of in together if of),
            *routes,
        ]
    return tuple(routes)


def _by_slug(found: Sequence[Measured], task: str | None) -> dict[str, TrajectoryPoint]:
    return {one.checkpoint.slug: one.record.points[task] for one in found if task in one.record.points}


def _steps(study: Study, model: str, found: Sequence[Measured]) -> dict[str, int]:
    """What phases are fitted against: steps, or the place in the plan where some have none or two have the same."""
    of_model = [one for one in study.planned if one.model == model]
    steps = [one.step for one in of_model if one.step is not None]
    if len(set(steps)) == len(of_model):
        return {one.checkpoint.slug: one.checkpoint.step or 0 for one in found}
    return {one.checkpoint.slug: of_model.index(one.checkpoint) for one in found}


def _route(
    model: str,
    name: str,
    is_task: bool,
    found: Sequence[Measured],
    points: Mapping[str, TrajectoryPoint],
    steps: Mapping[str, int],
    progress: Progress,
    rule: PhaseRule,
) -> Route:
    trajectory: Trajectory = {steps[slug]: point for slug, point in points.items()}
    axis = list(points.values())[-1].axis
    drawn: list[PathPoint] = []
    phases: list[TaskPhase | None] = []
    for one in found:
        point = points.get(one.checkpoint.slug)
        if point is None or point.axis != axis:  # a line is of one axis
            continue
        step = steps[one.checkpoint.slug]
        phase = phase_at(trajectory, step, rule)
        phases.append(phase)
        rows = {str(row["task"]): row for row in one.record.rows}
        shown = -point.performance.value if axis.startswith("-") else point.performance.value
        drawn.append(
            PathPoint(
                step=step,
                performance=shown,
                mui=point.mui.value,
                phase=Phase.UNDECIDED if phase is None else phase.call.phase,
                mui_interval=_interval(rows.get(name), "mui") if is_task else _of_pooled(one, name),
                performance_interval=_interval(rows.get(name), "performance") if is_task else None,
                name=progress.words(one.x),
            )
        )
    return Route(model, name, is_task, Path(name, axis, tuple(drawn), progress.counted), tuple(phases))


def _of_pooled(one: Measured, name: str) -> tuple[float, float] | None:
    return one.pooled_mui if name == POOLED else None


def _interval(row: Row | None, name: str) -> tuple[float, float] | None:
    low, high = (None if row is None else row.get(f"{name}_{end}") for end in ("low", "high"))
    return None if low is None or high is None else (low, high)


def _mean(tasks: Sequence[Mapping[str, TrajectoryPoint]]) -> dict[str, TrajectoryPoint]:
    """Of checkpoints at which all tasks have a point on one axis; a sample adds to the mean what it adds to its task,
    over the number of tasks."""
    means = {}
    for slug in tasks[0]:
        points = [of_task[slug] for of_task in tasks if slug in of_task]
        if len(points) == len(tasks) and len({point.axis for point in points}) == 1:
            performance, mui = (
                _mean_point([getattr(point, name) for point in points]) for name in ("performance", "mui")
            )
            if performance is not None and mui is not None:
                means[slug] = TrajectoryPoint(points[0].axis, performance, mui)
    return means


def _mean_point(points: Sequence[Point]) -> Point | None:
    n, value = len(points), float(np.mean([point.value for point in points]))
    estimates = [point for point in points if isinstance(point, Estimate)]
    scores = [point for point in points if isinstance(point, Score)]
    if len(estimates) == n:
        return Estimate(value, np.concatenate([point.influence for point in estimates]) / n)
    if len(scores) < n:
        return None
    errors = [score.standard_error for score in scores]
    known = [error for error in errors if error is not None]
    return Score(value, float(np.linalg.norm(known)) / n if len(known) == n else None)

"""What is kept of a point of a run, so that later ones can be compared with it sample by sample.

An estimate has an amount for each sample. To keep it small whatever the probe set is, the samples are dealt out to at
most 512 groups, whose amounts are added up (random groups: Wolter 2007, "Introduction to Variance Estimation"). What a
group adds is a draw like what a sample adds, so the variance of a slope comes out the same on average, with as many
degrees of freedom as there are groups.

Shapes: N samples, G groups.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mui_callback.metrics.phases import PhaseCall, PhaseRule, Point, Score, call_phase
from mui_callback.metrics.resampling import Estimate
from mui_callback.metrics.utilization import FloatArray

_MOST_GROUPS = 512
_STORED = np.dtype("<f4")
"""Seven digits, where an influence has two or three that tell anything."""


@dataclass(frozen=True)
class TrajectoryPoint:
    """Performance and MUI of a task at one step."""

    axis: str
    """What performance is, such as ``"-loss"``; higher is better."""
    performance: Point
    mui: Point

    @property
    def kind(self) -> tuple[str, int, int]:
        """Equal for points that a line can be fitted to: one axis, measured on as many samples."""
        return self.axis, _n_amounts(self.performance), _n_amounts(self.mui)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"axis": self.axis, "performance": _to_dict(self.performance), "mui": _to_dict(self.mui)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> TrajectoryPoint:
        """From what `to_dict` gave.

        Raises:
            ValueError: it is something else, as the following.
            LookupError: …
            TypeError: …
        """
        return cls(str(stored["axis"]), _from_dict(stored["performance"]), _from_dict(stored["mui"]))


Trajectory = dict[int, TrajectoryPoint]
"""The points of one task by step."""
Trajectories = dict[str | None, Trajectory]
"""By task; None for all tasks pooled."""


@dataclass(frozen=True)
class TaskPhase:
    """The phase of a task at a point."""

    call: PhaseCall
    point: TrajectoryPoint
    """The last of those that were looked at."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it, the point included."""
        return {**asdict(self.call), "phase": self.call.phase.value, "point": self.point.to_dict()}


def phase_at(points: Trajectory, step: int, rule: PhaseRule) -> TaskPhase | None:
    """The phase of a task at a step, from the points up to it; those of another kind than the last one end the window.

    Args:
        points: of one task.
        step: later points are not looked at.
        rule: of the phases.

    Returns:
        None where there is no point.
    """
    steps = sorted(at for at in points if at <= step)[-rule.window :]
    if not steps:
        return None
    last = points[steps[-1]]
    others = [place for place, at in enumerate(steps, start=1) if points[at].kind != last.kind]
    steps = steps[max(others, default=0) :]
    performance: list[Any] = [points[at].performance for at in steps]
    mui: list[Any] = [points[at].mui for at in steps]
    call = call_phase(steps, performance, mui, rule)
    return TaskPhase(call, last)


def pruned(trajectories: Trajectories, step: int, window: int) -> Trajectories:
    """What the calls from a step on can need: of each task, the last points up to it, and the last ones after it.

    There are later ones where training went back to a checkpoint, and those that were recorded are not made again.
    """
    kept_steps = {
        task: {*sorted(at for at in points if at <= step)[-window:], *sorted(points)[-window:]}
        for task, points in trajectories.items()
    }
    return {
        task: {at: points[at] for at in sorted(points) if at in kept_steps[task]}
        for task, points in trajectories.items()
    }


def to_list(trajectories: Trajectories) -> list[list[Any]]:
    """As JSON can hold them."""
    return [[task, step, point.to_dict()] for task, points in trajectories.items() for step, point in points.items()]


def from_list(stored: list[list[Any]]) -> Trajectories:
    """From what `to_list` gave.

    Raises:
        ValueError: see `TrajectoryPoint.from_dict`, as the following.
        LookupError: …
        TypeError: …
    """
    trajectories: Trajectories = {}
    for task, step, point in stored:
        trajectories.setdefault(task, {})[int(step)] = TrajectoryPoint.from_dict(point)
    return trajectories


def kept(point: Point, sign: int = 1) -> Point:
    """A value as a trajectory keeps it: the samples that it is of, in groups, rounded as they are stored.

    Args:
        point: a value.
        sign: -1 for the negative of it.
    """
    if isinstance(point, Score):
        return Score(sign * point.value, point.standard_error)
    return Estimate(sign * point.value, sign * _grouped(point.influence[point.counts]))


def _grouped(influence_N: FloatArray) -> FloatArray:
    """Float64 ``[G]``; neighbours, which are more often alike, go to different groups."""
    n_groups = min(len(influence_N), _MOST_GROUPS)
    sum_G = np.zeros(n_groups)
    for start in range(0, len(influence_N), _MOST_GROUPS):
        some = influence_N[start : start + _MOST_GROUPS]
        sum_G[: len(some)] += some
    return sum_G.astype(_STORED).astype(np.float64)


def _n_amounts(point: Point) -> int:
    """0 for a score, which has one of its own."""
    return len(point.influence) if isinstance(point, Estimate) else 0


def _to_dict(point: Point) -> dict[str, Any]:
    if isinstance(point, Score):
        return {"value": point.value, "standard_error": point.standard_error}
    return {"value": point.value, "influence": b64encode(point.influence.astype(_STORED).tobytes()).decode()}


def _from_dict(stored: Mapping[str, Any]) -> Point:
    if "influence" in stored:
        influence = np.frombuffer(b64decode(stored["influence"], validate=True), _STORED).astype(np.float64)
        return Estimate(float(stored["value"]), influence)
    error = stored["standard_error"]
    return Score(float(stored["value"]), None if error is None else float(error))

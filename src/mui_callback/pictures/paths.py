"""The way that each task has come in the plane of performance and MUI, from what was logged of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mui_callback.metrics.catalogue import PREFIX, key
from mui_callback.metrics.phases import Phase

Scalars = Mapping[int, Mapping[str, float]]
"""What was logged, by step and key."""


@dataclass(frozen=True)
class PathPoint:
    """One probe."""

    step: int
    performance: float
    """As it was logged: a loss is the loss."""
    mui: float
    """In [0, 1]."""
    phase: Phase
    mui_interval: tuple[float, float] | None = None
    performance_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Path:
    """The probes of one task, in the order of the steps."""

    task: str | None
    """None: all tasks pooled."""
    axis: str
    """What performance is: ``"choice_accuracy"``, ``"benchmark/…"``, or, where lower is better, ``"-loss"``."""
    points: tuple[PathPoint, ...]

    @property
    def lower_is_better(self) -> bool:
        """Whether performance is a loss, or the like."""
        return self.axis.startswith("-")


def path_of(task: str | None, axis: str, logged: Scalars) -> Path:
    """The path of a task. A step at which its performance or its MUI has no answer is left out.

    Args:
        task: its name; None for all tasks pooled.
        axis: its performance at the last point; earlier points on another axis are looked up on this one.
        logged: of the whole run.
    """
    name = axis.removeprefix("-")
    performance = f"{PREFIX}/{name}" if name.startswith("benchmark/") else key(name, task)
    points = []
    for step in sorted(logged):
        scalars = logged[step]
        if performance in scalars and key("mui", task) in scalars:
            points.append(
                PathPoint(
                    step,
                    scalars[performance],
                    scalars[key("mui", task)],
                    _phase(scalars.get(key("phase", task))),
                    _interval(scalars, key("mui", task)),
                    _interval(scalars, performance),
                )
            )
    return Path(task, axis, tuple(points))


def _interval(scalars: Mapping[str, float], name: str) -> tuple[float, float] | None:
    low, high = scalars.get(f"{name}_low"), scalars.get(f"{name}_high")
    if low is not None and high is not None:
        return low, high
    error = scalars.get(f"{name}_stderr")
    return None if error is None else (scalars[name] - 1.96 * error, scalars[name] + 1.96 * error)


def _phase(code: float | None) -> Phase:
    return next((phase for phase in Phase if phase.code == code), Phase.UNDECIDED)

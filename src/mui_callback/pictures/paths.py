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
    name: str = ""
    """What it is called in a picture, where that is not the step."""

    def __str__(self) -> str:
        return self.name or f"{self.step:,}"


@dataclass(frozen=True)
class Path:
    """The probes of one task, in the order of the steps."""

    task: str | None
    """None: all tasks pooled."""
    axis: str
    """What performance is: ``"choice_accuracy"``, ``"benchmark/…"``, or, where lower is better, ``"-loss"``."""
    points: tuple[PathPoint, ...]
    counted: tuple[str, str] = ("step", "steps")
    """What the names of points are, for one and for several."""

    @property
    def lower_is_better(self) -> bool:
        """Whether performance is a loss, or the like."""
        return self.axis.startswith("-")


class Paths:
    """The paths of a run that goes on: what was found of a step is found once."""

    def __init__(self) -> None:
        self._found: dict[tuple[str | None, str], dict[int, PathPoint | None]] = {}

    def forget(self, step: int) -> None:
        """What was logged at a step is not what it was."""
        for found in self._found.values():
            found.pop(step, None)

    def of(self, task: str | None, axis: str, logged: Scalars) -> Path:
        """The path of a task. A step at which its performance or its MUI has no answer is left out.

        Args:
            task: its name; None for all tasks pooled.
            axis: its performance at the last point; earlier points on another axis are looked up on this one.
            logged: of the whole run.
        """
        found = self._found.setdefault((task, axis), {})
        for step in logged.keys() - found.keys():
            found[step] = _point(task, axis, step, logged[step])
        return Path(task, axis, tuple(point for _, point in sorted(found.items()) if point is not None))


def _point(task: str | None, axis: str, step: int, scalars: Mapping[str, float]) -> PathPoint | None:
    name, mui = axis.removeprefix("-"), key("mui", task)
    performance = f"{PREFIX}/{name}" if name.startswith("benchmark/") else key(name, task)
    if performance not in scalars or mui not in scalars:
        return None
    phase = _phase(scalars.get(key("phase", task)))
    return PathPoint(
        step, scalars[performance], scalars[mui], phase, _interval(scalars, mui), _interval(scalars, performance)
    )


def _interval(scalars: Mapping[str, float], name: str) -> tuple[float, float] | None:
    low, high = scalars.get(f"{name}_low"), scalars.get(f"{name}_high")
    if low is not None and high is not None:
        return low, high
    error = scalars.get(f"{name}_stderr")
    return None if error is None else (scalars[name] - 1.96 * error, scalars[name] + 1.96 * error)


def _phase(code: float | None) -> Phase:
    return next((phase for phase in Phase if phase.code == code), Phase.UNDECIDED)

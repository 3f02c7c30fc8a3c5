"""Where the points of a training run go."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from mui_callback.report import MUIReport


@dataclass(frozen=True)
class ProbePoint:
    """One probe of a training run, at one step: a report, or the reason why there is none."""

    step: int
    """Optimizer steps done."""
    report: MUIReport | None = None
    error: str | None = None
    """What went wrong, where the probe failed."""
    scalars: dict[str, float] = field(default_factory=dict)
    """What is logged, by key; empty where the probe failed."""


@runtime_checkable
class Sink(Protocol):
    """Takes every point. What it raises becomes a warning and never reaches the training loop."""

    def write(self, point: ProbePoint) -> None:
        """Take one point; called in the order of the steps, on the main process only."""

    def close(self) -> None:
        """Called once at the end of training; nothing is written afterwards."""

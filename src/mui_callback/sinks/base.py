"""Where the points of a training run go."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from mui_callback.layout import ExpertLayout
from mui_callback.report import MUIReport
from mui_callback.settings import ProbeSettings


@dataclass(frozen=True)
class RunDescription:
    """What stays the same over all points of a training run."""

    task_names: tuple[str, ...]
    probe_set: str
    """Fingerprint of the probe set."""
    settings: ProbeSettings
    layout: ExpertLayout


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


class Sink(Protocol):
    """Takes every point. What it raises becomes a warning and never reaches the training loop.

    Its methods are called on the main process only.
    """

    def open(self, run: RunDescription) -> None:
        """Called once, before the first point."""

    def write(self, point: ProbePoint) -> None:
        """Take one point, in the order of the steps."""

    def close(self) -> None:
        """Called once at the end of training; nothing is written afterwards."""

"""Where the points of a training run go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from mui_callback.layout import ExpertLayout
from mui_callback.metrics.phases import Point
from mui_callback.metrics.trajectory import TaskPhase
from mui_callback.probe.ablation import AblationReport
from mui_callback.report import MUIReport
from mui_callback.settings import ProbeSettings
from mui_callback.spent import Spent


@dataclass(frozen=True)
class RunDescription:
    """How a training run is probed: what stays the same over all its points."""

    task_names: tuple[str, ...]
    probe_set: str
    """Fingerprint of the probe set."""
    settings: ProbeSettings
    layout: ExpertLayout
    id: str = ""
    """The same where training goes on after a pause; another one in each run."""
    start_step: int = 0
    """Optimizer steps done before."""
    points_before: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    """What was logged before, by step and key, where training goes on."""

    def to_dict(self) -> dict[str, Any]:
        """How it is probed, as JSON gives it back: tasks, probe set, settings and expert layers."""
        layers = [{**asdict(layer), "shared_widths": list(layer.shared_widths)} for layer in self.layout.layers]
        return {
            "tasks": list(self.task_names),
            "probe_set": self.probe_set,
            "settings": {**asdict(self.settings), "rules": list(self.settings.rules)},
            "layers": layers,
        }


@dataclass(frozen=True)
class Alert:
    """Something in a run that its owner wants to be told of."""

    kind: str
    """``"collapsing"``, ``"coarsening"``, ``"dead_experts"``, ``"concentration"``, ``"overhead"`` or ``"failure"``."""
    step: int
    title: str
    """Less than 64 characters, which is what W&B takes."""
    text: str
    is_bad: bool = False
    """Whether something went wrong, or is only unusual."""


@dataclass(frozen=True, repr=False)
class ProbePoint:
    """One probe of a training run, at one step: a report, or the reason why there is none.

    At the end of training there may be one more at the last step, without either, that holds what was found besides.
    """

    step: int
    """Optimizer steps done."""
    report: MUIReport | None = None
    error: str | None = None
    """What went wrong, where the probe failed, in a line."""
    traceback: str = ""
    """Where it went wrong, if that was in this process."""
    scalars: dict[str, float] = field(default_factory=dict)
    """What is logged, by key; empty where the probe failed."""
    spent: Spent = field(default_factory=Spent)
    """The time that the run has taken up to this point."""
    phases: Mapping[str | None, TaskPhase] = field(default_factory=dict)
    """By task; None for all tasks pooled."""
    benchmarks: Mapping[str, Point] = field(default_factory=dict)
    """Scores of the benchmarks that were run, by name."""
    ablation: AblationReport | None = None
    """The causal check after the last step."""
    failures: Mapping[str, str] = field(default_factory=dict)
    """What went wrong besides the probe, such as ``"benchmark arc_easy"``, and why, in a line."""

    alerts: tuple[Alert, ...] = ()
    """What begins here that is worth one; see `mui_callback.monitoring.alert_rule`."""

    def __repr__(self) -> str:
        found = repr(self.report)
        if self.report is None:
            found = f"error={self.error!r}" if self.error is not None else ", ".join((*self.scalars, *self.failures))
        return f"ProbePoint(step={self.step}, {found})"


class Sink(Protocol):
    """Takes every point. What it raises becomes a warning, one for each sink, and does not reach the training loop,
    unless ``on_error="raise"`` asks for it; the next point is tried again, also after a failure to open.

    Its methods are called on the main process only. In warnings it has its `name`, or else that of its class. If it has
    a method ``between_points()``, that is called at each step without a point; what it raises never ends training.
    """

    def open(self, run: RunDescription) -> None:
        """Called once, before the first point."""

    def write(self, point: ProbePoint) -> None:
        """Take one point, in the order of the steps."""

    def close(self) -> None:
        """Called once at the end of training; nothing is written afterwards."""


class TrackerError(Exception):
    """Raised by a sink that logs to the run of another one, where that run fails: one warning is enough for both.

    Args:
        sink: the other one. What went wrong is the cause.
    """

    def __init__(self, sink: Sink) -> None:
        super().__init__(getattr(sink, "name", type(sink).__name__))
        self.sink = sink

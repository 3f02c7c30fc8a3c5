"""What a user asks for besides the probe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from mui_callback.benchmarks.base import Benchmark
from mui_callback.benchmarks.given import Benchmarks, as_benchmarks, check_benchmarks
from mui_callback.metrics.catalogue import Detail
from mui_callback.metrics.phases import PhaseRule
from mui_callback.monitoring.alert_rule import AlertRule
from mui_callback.monitoring.benchmark_runs import BenchmarksEvery, own_schedule
from mui_callback.monitoring.performance_axis import check_performance
from mui_callback.monitoring.schedule import Schedule
from mui_callback.probe.ablation import What
from mui_callback.settings import ProbeSettings

Ablate = What | bool


@dataclass(frozen=True)
class Asked:
    """What is asked for besides the probe.

    Raises:
        TypeError: something is of the wrong kind.
        ValueError: something is out of its range.
        ImportError: there are tasks of lm-evaluation-harness, which is not installed.
    """

    benchmarks: Benchmarks = ()
    """See `as_benchmarks`."""
    benchmarks_every: BenchmarksEvery = "probe"
    """``"probe"``: with each probe; or optimizer steps between them. Where they are due, a probe is made too."""
    performance: Mapping[str | None, str] = field(default_factory=dict)
    """By task (None for all pooled) the name of the score that is its performance in phases, with ``-`` before it where
    lower is better; see `mui_callback.monitoring.performance_axis` for what it is otherwise."""
    phase_window: int = PhaseRule.window
    """See `PhaseRule`, as the following."""
    phase_level: float = PhaseRule.level
    detail: Detail = "model"
    """``"layers"``: what is logged of the whole model, and of each layer besides; see `MUIReport.scalars`."""
    alerts: AlertRule | bool = True
    """See `mui_callback.monitoring.alert_rule`."""
    ablate: Ablate = False
    """``"neurons"`` (or True) or ``"experts"``: after the last step, run each task without its key ones; see
    `mui_callback.probe.ablation.ablate`."""

    def __post_init__(self) -> None:
        check_benchmarks(self.benchmarks)
        own_schedule(self.benchmarks_every, Schedule())
        check_performance(self.performance)
        if self.benchmarks_every != "probe" and not self.benchmarks:
            raise ValueError(f"benchmarks_every: {self.benchmarks_every!r} was given, but there are no benchmarks")
        self.rule  # noqa: B018 - raises
        if self.detail not in get_args(Detail):
            raise ValueError(f"detail: expected 'model' or 'layers', got {self.detail!r}")
        if not isinstance(self.alerts, AlertRule | bool):
            raise TypeError(f"alerts: expected True, False or an AlertRule, got {self.alerts!r}")
        if self.ablate not in (*get_args(What), True, False):
            raise ValueError(f"ablate: expected 'neurons', 'experts', True or False, got {self.ablate!r}")

    @property
    def rule(self) -> PhaseRule:
        """Of the phases."""
        try:
            return PhaseRule(self.phase_window, self.phase_level)
        except ValueError as error:
            raise ValueError(f"phase_{error}") from None

    def load(self, settings: ProbeSettings, tokenizer: Any) -> tuple[Benchmark, ...]:
        """The benchmarks.

        Args:
            settings: of the probe.
            tokenizer: for samples that are text.

        Raises:
            Exception: see `as_benchmarks`.
        """
        return as_benchmarks(
            self.benchmarks, tokenizer, max_length=settings.max_length, batch_tokens=settings.batch_tokens
        )

    @property
    def what(self) -> What | None:
        """What is ablated."""
        return "neurons" if self.ablate is True else self.ablate or None

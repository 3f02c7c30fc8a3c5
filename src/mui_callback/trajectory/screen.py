"""What became of a study, and how the terminal shows it."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.console import Console
from rich.text import Text

from mui_callback.trajectory.checkpoint import CheckpointId
from mui_callback.trajectory.config import StudyConfig
from mui_callback.trajectory.records import RESULTS_NAME


@dataclass(frozen=True)
class StudyOutcome:
    """What became of a study."""

    n_planned: int
    n_measured: int
    failures: dict[CheckpointId, str] = field(default_factory=dict)
    """Of this run, in all of its processes."""

    @property
    def is_complete(self) -> bool:
        """Whether every checkpoint is in the table."""
        return self.n_measured == self.n_planned


def show_outcome(console: Console, config: StudyConfig, outcome: StudyOutcome) -> None:
    """Which checkpoints are not measured and why, and what to do next."""
    n_missing = outcome.n_planned - outcome.n_measured
    for checkpoint, why in outcome.failures.items():
        console.print(Text(f"not measured: {checkpoint}: {why}", style="red"), soft_wrap=True)
    if n_missing:
        console.print(f"{n_missing} of {outcome.n_planned} checkpoints are not measured; the same command tries again")
    if not outcome.n_measured:
        return
    lines = {"table": config.output / RESULTS_NAME, "report": f"mui-callback report {config.output}"}
    for name, value in lines.items():
        console.print(Text(f"{name:<8}{value}"), soft_wrap=True)

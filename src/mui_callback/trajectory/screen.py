"""What a study shows in the terminal when it ends."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from mui_callback.trajectory.config import StudyConfig
from mui_callback.trajectory.records import RESULTS_NAME
from mui_callback.trajectory.run import StudyOutcome


def show_outcome(console: Console, config: StudyConfig, outcome: StudyOutcome) -> None:
    """How many checkpoints are measured, which are not and why, and what to do next."""
    n_missing = outcome.n_planned - outcome.n_measured
    for checkpoint, why in outcome.failures.items():
        console.print(Text(f"not measured: {checkpoint}: {why}", style="red"), soft_wrap=True)
    if n_missing:
        console.print(f"{n_missing} of {outcome.n_planned} checkpoints are not measured; the same command tries again")
    lines = {"table": config.output / RESULTS_NAME, "report": f"mui-callback report {config.output}"}
    for name, value in lines.items():
        console.print(Text(f"{name:<8}{value}"), soft_wrap=True)

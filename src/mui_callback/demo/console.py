"""What the demo shows in the terminal: one line for each probe, and a progress bar below them."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mui_callback.pictures.palette import colors_of
from mui_callback.report import MUIReport
from mui_callback.sinks.base import ProbePoint, RunDescription
from mui_callback.task_report import TaskReport

LEGEND = (
    "On held-out text: loss in nats per byte; acc: bytes predicted right; MUI: expert\n"
    "neurons that are key (it rises while the model stores more, and falls when it\n"
    "needs less); pick: sums picked right out of four; shared: key neurons in shared\n"
    "experts; key: experts that own a key neuron in most samples."
)

_SEPARATOR = " │ "


class Screen(TrainerCallback):
    """A progress bar that follows the Trainer, and a table that grows by one line with each probe.

    It is a context manager, a callback of the Trainer and a sink for `MUICallback`.

    Args:
        console: where to print; without a terminal there are the lines and no bar.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("steps, loss {task.fields[loss]},"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
        )
        self._bar = self._progress.add_task("training", total=None, loss="-")
        self._has_header = False

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        self._progress.update(self._bar, completed=state.global_step, total=state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the training loss."""
        if logs and "loss" in logs:
            self._progress.update(self._bar, loss=f"{float(logs['loss']):.2f}")

    def open(self, run: RunDescription) -> None:
        """The header waits for the first report, which says what there is to show."""

    def write(self, point: ProbePoint) -> None:
        """Print the line of one probe."""
        if point.report is None:
            self._console.print(
                f"{point.step:4d}{_SEPARATOR}the probe failed: {point.error}", style="red", markup=False
            )
            return
        if not self._has_header:
            self._has_header = True
            self._console.print(header(point.report))
        self._console.print(row(point.step, point.report))

    def close(self) -> None:
        """The bar ends with the context."""


def header(report: MUIReport) -> Text:
    """The two lines above the table."""
    colors = colors_of(report.task_names)
    names, columns = [Text(" " * 4)], [Text("step")]
    for name, task in report.tasks.items():
        heading = "loss acc%  MUI%" + (" pick%" if task.choice_accuracy is not None else "")
        names.append(Text(name.center(len(heading)), style=f"bold {colors[name]}"))
        columns.append(Text(heading))
    names.append(Text("all tasks".center(12), style="bold"))
    columns.append(Text("shared% key%"))
    separator = Text(_SEPARATOR, style="dim")
    return Text("\n").join([separator.join(names), separator.join(columns)])


def row(step: int, report: MUIReport) -> Text:
    """The line of one probe."""
    pooled = report.pooled
    cells = [
        f"{step:4d}",
        *map(_task_cells, report.tasks.values()),
        f"{_percent(pooled.shared_share, 7)} {_percent(pooled.key_expert_proportion, 4)}",
    ]
    return Text(_SEPARATOR, style="dim").join(map(Text, cells))


def _task_cells(task: TaskReport) -> str:
    loss = "-" if task.loss is None else f"{task.loss:.2f}"
    cells = f"{loss:>4} {_percent(task.token_accuracy, 4)} {_percent(task.mui, 5, digits=1)}"
    return cells if task.choice_accuracy is None else f"{cells} {_percent(task.choice_accuracy, 5)}"


def _percent(share: float | None, width: int, digits: int = 0) -> str:
    return f"{'-' if share is None else format(100 * share, f'.{digits}f'):>{width}}"

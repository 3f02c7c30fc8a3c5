"""What the causal check shows in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from mui_callback.metrics.ablation import LossChange
from mui_callback.probe.ablation import AblationReport, TaskAblation
from mui_callback.studies.screen import plain_table


def show_ablation(console: Console, found: AblationReport) -> None:
    """A table of the tasks, and in words whether what is key matters more."""
    table = plain_table("task", "samples", f"key\n{found.what}", "\nloss", "without\nkey ones", "without\nrandom ones")
    for name, task in found.tasks.items():
        changes = task.changes
        shown = [Text("-")] * 3
        if changes is not None:
            shown = [Text(f"{changes.loss:.3f}"), _change(changes.key), _change(changes.random)]
        table.add_row(Text(name, style="bold"), f"{task.n_samples:,}", f"{task.n_key:,}", *shown)
    console.print(table)
    draws = (
        "one draw; its interval is over samples"
        if found.draws == 1
        else (f"the mean\nof {found.draws} draws; its interval is over samples and draws")
    )
    console.print(
        "loss: nats per response token. without: how much it is higher with these masked,\n"
        f"and the {100 * found.level:g} % interval. random: as many of the same layers and kinds, {draws}.",
        style="dim",
        highlight=False,
    )
    console.print()
    for name, task in found.tasks.items():
        console.print(f"{name}: {_in_words(task, found.what)}", highlight=False, markup=False)
    _say_overlap(console, found)


def _in_words(task: TaskAblation, what: str) -> str:
    if task.changes is None:
        return f"no key {what}" if task.n_samples else "no response token"
    interval = task.changes.difference.interval
    if interval is None:
        said = "cannot be said from 1 sample" if task.n_samples == 1 else "all samples change alike"
    elif interval.low > 0:
        said = f"key {what} matter more than random ones, by {_nats(interval.low)} to {_nats(interval.high)} nats"
    elif interval.high < 0:
        said = f"key {what} matter less than random ones, by {_nats(-interval.high)} to {_nats(-interval.low)} nats"
    else:
        span = f"{_nats(interval.low, '+')} to {_nats(interval.high, '+')} nats"
        said = f"key {what} and random ones cannot be told apart ({span})"
    return said


def _say_overlap(console: Console, found: AblationReport) -> None:
    """Which random ones are key, since a layer and kind had too few others."""
    shares = {
        name: sum(task.n_overlap) / (task.n_key * found.draws) for name, task in found.tasks.items() if task.n_key
    }
    overlaps = [f"{100 * share:.2g} % ({name})" for name, share in shares.items() if share]
    if overlaps:
        console.print(
            f"Of the random ones {', '.join(overlaps)} are key too, as there are too few others, so the difference is "
            "rather too small.",
            style="yellow",
            highlight=False,
            markup=False,
        )


def _change(change: LossChange) -> Text:
    shown = Text(_nats(change.value, "+"))
    if change.interval is None:
        return shown
    return shown.append(f"\n{_nats(change.interval.low, '+')} … {_nats(change.interval.high, '+')}", style="dim")


def _nats(value: float, sign: str = "") -> str:
    """With three decimals, or the first digit that is not zero."""
    return f"{value:{sign}.3f}" if value == 0 or abs(value) >= 5e-4 else f"{value:{sign}.0e}"

"""What the studies show in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mui_callback.metrics.diversity import Difference, IntervalEstimate
from mui_callback.metrics.max_coverage import Kept, Selection
from mui_callback.metrics.utilization import IntArray
from mui_callback.pictures.palette import colors_of
from mui_callback.studies.data_sets import DiversityStudy


def show_diversity(console: Console, study: DiversityStudy) -> None:
    """A table of the data sets, and in words which of them differ."""
    at, level = study.comparison.size, study.comparison.level
    table = plain_table(
        "data set", "samples", "response\ntokens", f"MUI of\n{_samples(at)}", "MUI\nof all", "MUI in\ntotal"
    )
    table.add_column("\nseen", justify="right", no_wrap=True)
    colors = colors_of(study.data_sets)
    for name, one in study.data_sets.items():
        table.add_row(
            Text(name, style=f"bold {colors[name]}"),
            f"{one.n_samples:,}",
            f"{one.n_tokens:,}",
            _estimate(study.comparison.mui[name]),
            _percent(one.mui),
            _estimate(one.total, digits=1),
            "-" if one.seen is None else f"{100 * one.seen:.0f} %",
        )
    console.print(table)
    console.print(
        f"MUI: key neurons, % of the neurons of all experts; below it the {100 * level:g} % interval.\n"
        f"of {_samples(at)}: the mean over all choices of as many.\n"
        "in total: what ever more samples would come to, at least (Chao2).\n"
        "seen: of all samples, as share of that total.",
        style="dim",
        highlight=False,
    )
    _show_differences(console, study.comparison.differences, at, level)


def show_selection(console: Console, selection: Selection, tasks: Sequence[str], size: int) -> None:
    """A table of how much the first samples keep, and as many random ones."""
    n_chosen = len(selection.order)
    tasks = tasks if len(tasks) > 1 else ()
    table = plain_table("samples", "", "all tasks")
    colors = colors_of(tasks)
    for task in tasks:
        table.add_column(Text(task, style=f"bold {colors[task]}"), justify="right", overflow="fold")
    for n in _shown_sizes(n_chosen):
        table.add_row(f"{n:,}", "chosen", *_shares(selection.kept, n)[: 1 + len(tasks)])
        table.add_row("", "random", *_shares(selection.random, n)[: 1 + len(tasks)], style="dim")
    console.print(table)
    console.print(
        "% of the key neurons of all samples that the first samples keep; all tasks: the\n"
        "mean. random: expected of as many, drawn from all samples of all tasks.",
        style="dim",
        highlight=False,
    )
    if n_chosen < size:
        console.print(f"The first {n_chosen} keep everything: fewer than the {size} asked for.", highlight=False)


def show_cost(console: Console, n_tokens_N: IntArray, order: IntArray) -> None:
    """How much less a probe of the chosen samples is."""
    whole = int(n_tokens_N.sum())
    share = f"{100 * int(n_tokens_N[order].sum()) / whole:.3g} %"
    console.print(
        f"{len(order):,} of {_samples(len(n_tokens_N))}, with {share} of the response tokens.", highlight=False
    )


def show_written(console: Console, directory: Path, written: Mapping[Path, int]) -> None:
    """Where the chosen samples are."""
    files = ", ".join(f"{path.name} ({_samples(n)})" for path, n in written.items())
    console.print(f"\nWritten to {directory}: {files}.", highlight=False, markup=False, soft_wrap=True)


def show_files(console: Console, files: Mapping[str, Path | None]) -> None:
    """What else was written, and where."""
    for number, (name, path) in enumerate((name, path) for name, path in files.items() if path is not None):
        console.print("" if number else "\n", f"{name}: {path}", sep="", highlight=False, markup=False, soft_wrap=True)


def _show_differences(console: Console, differences: Sequence[Difference], at: int, level: float) -> None:
    if not differences:
        return
    together = ", for all pairs together" if len(differences) > 1 else ""
    console.print(f"\nAt {_samples(at)}, with {100 * level:g} % confidence{together}:", highlight=False)
    for difference in sorted(differences, key=_place):
        console.print(f"  {_in_words(difference)}", highlight=False, markup=False)


def _place(difference: Difference) -> tuple[bool, bool, str]:
    """Clear ones first, those of one data set together."""
    higher = difference.first if difference.mui.value > 0 else difference.second
    return difference.is_clear is None, not difference.is_clear, higher


def _in_words(difference: Difference) -> str:
    first, second, low, high = difference.first, difference.second, difference.mui.low, difference.mui.high
    if low is None or high is None:
        return f"{first} and {second} cannot be compared: one sample has no interval"
    if not difference.is_clear:
        return f"{first} and {second} cannot be told apart ({100 * low:+.2f} to {100 * high:+.2f} points)"
    if difference.mui.value < 0:
        first, second, low, high = second, first, -high, -low
    return f"{first} has a higher MUI than {second}, by {100 * low:.2f} to {100 * high:.2f} points"


def plain_table(name: str, *numbers: str) -> Table:
    """A table of a column of names and columns of numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(name, overflow="fold", vertical="top")
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True)
    return table


def _estimate(estimate: IntervalEstimate | None, digits: int = 2) -> Text:
    if estimate is None:
        return Text("-")
    value = Text(_percent(estimate.value, digits))
    if estimate.low is None or estimate.high is None:
        return value
    return value.append(f"\n{_percent(estimate.low, digits)} … {_percent(estimate.high, digits)}", style="dim")


def _percent(share: float, digits: int = 2) -> str:
    return f"{100 * share:.{digits}f}"


def _samples(n: int) -> str:
    return f"{n:,} sample{'' if n == 1 else 's'}"


def _shares(kept: Kept, n: int) -> list[str]:
    return ["-" if share is None else f"{100 * share[n - 1]:.1f}" for share in (kept.overall, *kept.by_task)]


def _shown_sizes(size: int) -> list[int]:
    """1, 2, 4, 8, … and all."""
    return [*(2**power for power in range(size.bit_length()) if 2**power < size), size]

"""Tables of a report: all rows, and the experts that tasks activate most."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any
from urllib.parse import quote

from mui_callback.html_report.measured import Measured
from mui_callback.html_report.numbers import NONE, is_share, number, percent
from mui_callback.metrics.catalogue import CATALOGUE
from mui_callback.pictures.top_experts import activated_experts
from mui_callback.task_report import TaskReport
from mui_callback.trajectory.checkpoint import in_tokens
from mui_callback.trajectory.records import Row

_COLUMNS = (
    "model", "checkpoint", "tokens", "step", "task", "response", "mui", "performance", "performance_axis", "mui_low",
    "mui_high", "performance_low", "performance_high", "loss", "token_accuracy", "choice_accuracy",
    "key_expert_proportion", "key_expert_mui", "effective_experts", "expert_gini", "top10_share", "shared_share",
    "shared_fair_ratio", "shared_in_top10", "dead_experts", "n_samples", "n_tokens",
)  # fmt: skip
MOST_ROWS = 2000
MOST_CSV_BYTES = 1_000_000
_MEANINGS = {metric.name: metric.definition.replace("\\|", "|").replace("`", "") for metric in CATALOGUE}


@dataclass(frozen=True)
class Cell:
    """One value."""

    words: str
    raw: str
    """The value as it is recorded, to be sorted by; empty where there is none."""
    is_number: bool


@dataclass(frozen=True)
class Column:
    """One column of the table of rows."""

    name: str
    meaning: str
    is_number: bool


@dataclass(frozen=True)
class RowTable:
    """All rows of a study, as far as there is room."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    n_rows: int
    """There are."""


@dataclass(frozen=True)
class TopExpert:
    """An expert of the ten, then and now."""

    label: str
    kind: str
    frequency: str
    mui: str
    frequency_before: str
    mui_before: str
    rank_before: str


@dataclass(frozen=True)
class TopTable:
    """The ten experts of a task."""

    task: str
    experts: tuple[TopExpert, ...]
    n_kept: int
    """Those that were among the ten at the first checkpoint."""
    has_before: bool


def row_table(rows: Sequence[Row]) -> RowTable:
    """The most important columns that have a value anywhere."""
    shown = [name for name in _COLUMNS if any(row.get(name) is not None for row in rows)]
    columns = tuple(
        Column(name, _MEANINGS.get(name, ""), any(isinstance(row.get(name), int | float) for row in rows))
        for name in shown
    )
    cells = tuple(tuple(_cell(name, row.get(name)) for name in shown) for row in rows[:MOST_ROWS])
    return RowTable(columns, cells, len(rows))


def as_csv(rows: Sequence[Row]) -> str:
    """All columns of all rows."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    file = StringIO()
    writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def as_data_url(text: str) -> str | None:
    """A link to a text that is in the page itself; None where it would be too long."""
    url = f"data:text/csv;charset=utf-8,{quote(text)}"
    return url if len(url) <= MOST_CSV_BYTES else None


def top_table(task: str, first: TaskReport | None, last: TaskReport) -> TopTable:
    """The ten at the last checkpoint, and what they were at the first.

    Args:
        task: its name.
        first: at another checkpoint with the same experts; None if there is none.
        last: at the last.
    """
    kinds = dict(zip(last.layout.expert_labels, last.layout.expert_kinds, strict=True))
    before = {} if first is None else {
        label: (rank, frequency, mui)
        for rank, (label, frequency, mui) in enumerate(first.top_experts(first.layout.n_experts), start=1)
    }  # fmt: skip
    experts = []
    for label, frequency, mui in activated_experts(last):
        then: tuple[Any, ...] = before.get(label, (None, None, None))
        experts.append(
            TopExpert(
                label, kinds[label], percent(frequency), percent(mui), percent(then[1]), percent(then[2]),
                NONE if not then[1] else str(then[0]),
            )
        )  # fmt: skip
    known = set() if first is None else {label for label, *_ in activated_experts(first)}
    return TopTable(task, tuple(experts), sum(one.label in known for one in experts), first is not None)


def all_rows(found: Sequence[Sequence[Measured]]) -> list[Row]:
    """Of all models."""
    return [row for of_model in found for one in of_model for row in one.record.rows]


def _cell(name: str, value: Any) -> Cell:
    if value is None:
        return Cell(NONE, "", False)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return Cell(str(value), str(value), False)
    if name == "tokens":
        words = in_tokens(value)
    elif is_share(name):
        words = percent(value)
    else:
        words = f"{value:,}" if isinstance(value, int) else number(value)
    return Cell(words, repr(value), True)

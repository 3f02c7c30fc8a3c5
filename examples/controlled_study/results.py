"""All runs of a study in two tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from .training import POOLED, Settings, run_path
from .variants import VARIANTS, Variant

Row = dict[str, Any]

MEAN = "mean over tasks"
"""In place of a task."""


def is_done(output: Path, variant: Variant, seed: int, settings: Settings) -> bool:
    """Whether a run is there.

    Raises:
        ValueError: it is there with other settings.
    """
    path = run_path(output, variant, seed)
    if not path.exists():
        return False
    before = json.loads(path.read_text(encoding="utf-8"))["settings"]
    if before != asdict(settings):
        raise ValueError(
            f"{path}: expected a run with {asdict(settings)}, got {before}; choose another output directory"
        )
    return True


@dataclass(frozen=True)
class Results:
    """What all runs have found."""

    rows: list[Row]
    """A row for each run, probe and task, in the order of the steps."""
    causal: list[Row]
    """A row for each run, task and mask."""
    seconds: float
    """Of processor time, in all runs together."""

    @classmethod
    def load(cls, output: Path, seeds: Sequence[int]) -> Results:
        """Those of some seeds; all variants must be there."""
        rows: list[Row] = []
        causal: list[Row] = []
        seconds = 0.0
        for seed in seeds:
            for variant in VARIANTS:
                found = json.loads(run_path(output, variant, seed).read_text(encoding="utf-8"))
                own = {"variant": variant.name, **asdict(variant), "seed": seed}
                rows += [{**own, **row} for row in found["rows"]]
                causal += [{**own, **row} for row in found["causal"]]
                seconds += found["seconds"]
        return cls(rows, causal, seconds)

    def write(self, output: Path) -> None:
        """As two Parquet files."""
        for name, rows in (("results", self.rows), ("causal", self.causal)):
            parquet.write_table(pyarrow.Table.from_pylist(rows), output / f"{name}.parquet")

    @property
    def steps(self) -> list[int]:
        """Of the probes, ascending."""
        return sorted({row["step"] for row in self.rows})

    @property
    def tasks(self) -> list[str]:
        """By name, without the row of all of them."""
        return [task for task in dict.fromkeys(row["task"] for row in self.rows) if task != POOLED]

    def of(self, metric: str, variant: Variant, step: int, task: str = MEAN) -> dict[int, float]:
        """A metric at a step, by seed; seeds where it has no answer are left out."""
        found = [self._found.get((variant.name, step, one), {}) for one in self._tasks_of(task)]
        return _mean_by_seed([{seed: row[metric] for seed, row in rows.items()} for rows in found])

    def change(self, what: str, masked: str, variant: Variant, task: str = MEAN) -> dict[int, float]:
        """The change of loss by a mask, by seed."""
        return _mean_by_seed(
            [
                {
                    row["seed"]: row["change"]
                    for row in self.causal
                    if (row["variant"], row["task"], row["what"], row["masked"]) == (variant.name, one, what, masked)
                }
                for one in self._tasks_of(task)
            ]
        )

    @cached_property
    def _found(self) -> dict[tuple[str, int, str], dict[int, Row]]:
        """Rows by seed, by variant, step and task."""
        found: dict[tuple[str, int, str], dict[int, Row]] = {}
        for row in self.rows:
            found.setdefault((row["variant"], row["step"], row["task"]), {})[row["seed"]] = row
        return found

    def _tasks_of(self, task: str) -> list[str]:
        return self.tasks if task == MEAN else [task]

    def path(self, variant: Variant, seed: int, task: str) -> list[Row]:
        """The rows of one run and task."""
        wanted = (variant.name, seed, task)
        return [row for row in self.rows if (row["variant"], row["seed"], row["task"]) == wanted]


def _mean_by_seed(by_task: Sequence[Mapping[int, float | None]]) -> dict[int, float]:
    """Over the tasks, of the seeds that all of them have an answer for."""
    found: dict[int, float] = {}
    for seed in sorted(set.intersection(*map(set, by_task))):
        values = [values[seed] for values in by_task]
        known = [value for value in values if value is not None]
        if len(known) == len(values):
            found[seed] = sum(known) / len(known)
    return found

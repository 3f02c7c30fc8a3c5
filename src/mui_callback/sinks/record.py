"""Reading the record of a run; see `mui_callback.sinks.jsonl.JsonlSink`, which writes it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mui_callback.metrics.trajectory import Trajectories, TrajectoryPoint
from mui_callback.spent import Spent

_PROBED = ("tasks", "probe_set", "settings", "layers")
_BEGINNING = 4096
"""Bytes that tell one record from another: the id of its first run is among them."""


@dataclass
class RecordedRun:
    """What the record holds of one run, or of the part of it that one process trained."""

    id: str
    probed: dict[str, Any]
    """How it was probed; see `RunDescription.to_dict`."""
    points: dict[int, dict[str, float]] = field(default_factory=dict)
    """Scalars by step, without the probes that failed."""
    spent: Spent = field(default_factory=Spent)
    """Up to its last point."""
    trajectories: Trajectories = field(default_factory=dict)
    """What phases were called from, of every point."""
    top_experts: list[dict[str, Any]] = field(default_factory=list)
    """The ten with the highest activated frequency at the last point that tells, all tasks pooled."""
    troubles: list[tuple[int, str]] = field(default_factory=list)
    """Steps and errors: probes that failed, and what failed besides them."""
    alerts: list[tuple[int, str]] = field(default_factory=list)
    """Steps and texts of what its owner was told."""
    last_time: float | None = None
    """When the last point was written, in seconds since the epoch."""


class RecordReader:
    """Reads a record that may grow: each time only what has come since.

    A line that cannot be read, as one that was cut short, is left out. A last line without its end is left out until it
    has one. Where there is another file than before (it begins otherwise, or is shorter), all of that is read.

    Args:
        path: the record.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._forget()

    def _forget(self) -> None:
        self.runs: list[RecordedRun] = []
        """In the order in which they began."""
        self._complaints: list[str] = []
        self._n_lines = self._end = 0
        self._beginning = self._rest = b""

    @property
    def complaints(self) -> list[str]:
        """The lines that cannot be read, in words."""
        rest = self._rest.strip()
        return [*self._complaints, *([self._complaint(rest, self._n_lines + 1, "it has no end")] if rest else [])]

    def read(self) -> None:
        """Read on.

        Raises:
            OSError: there is no file, or it cannot be read.
        """
        with self.path.open("rb") as file:
            if file.read(len(self._beginning)) != self._beginning or file.seek(0, os.SEEK_END) < self._end:
                self._forget()
            is_first = not self._end
            file.seek(self._end)
            found = file.read()
        whole, end, rest = found.rpartition(b"\n")
        lines = (whole + end).splitlines()
        self._end += len(whole + end)
        self._rest = rest
        if is_first:
            self._beginning = found[: min(_BEGINNING, self._end)]
        for line in lines:
            self._take(line)

    def read_to_the_end(self) -> None:
        """Read on, and take the last line as it is; to be called once."""
        self.read()
        rest, self._rest = self._rest, b""
        self._take(rest)

    def _take(self, line: bytes) -> None:
        self._n_lines += 1
        wrong = _read_line(line, self.runs) if line.strip() else None
        if wrong is not None:
            self._complaints.append(self._complaint(line, self._n_lines, wrong))

    def _complaint(self, line: bytes, number: int, wrong: str) -> str:
        what = f"{self.path}, line {number}: expected a run or a point of one, got {line[:40]!r}"
        return f"{what} ({wrong}); it is left out."


def read_record(path: str | os.PathLike[str]) -> tuple[list[RecordedRun], list[str]]:
    """The runs in a record, in the order in which they began, and the lines of it that cannot be read, in words.

    Without a file there are none of either; see `RecordReader`.

    Raises:
        OSError: there is a file, but it cannot be read.
    """
    reader = RecordReader(path)
    if reader.path.exists():
        reader.read_to_the_end()
    return reader.runs, reader.complaints


def _read_line(line: bytes, runs: list[RecordedRun]) -> str | None:
    """Adds what a line holds; what is wrong with it, if anything."""
    try:
        _add_row(json.loads(line), runs)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _add_row(row: dict[str, Any], runs: list[RecordedRun]) -> None:
    if "run" in row:
        run = row["run"]
        runs.append(RecordedRun(run["id"], {name: run[name] for name in _PROBED}))
        return
    of_run = next((run for run in reversed(runs) if run.id == row["id"]), None)
    if of_run is None:
        raise ValueError(f"there is no run {row['id']!r} before it")
    spent = Spent(**row["spent"])
    step = int(row["step"])
    troubles = [(step, str(row["error"]))] if "error" in row else []
    troubles += [(step, f"{what}: {why}") for what, why in row.get("failures", {}).items()]
    alerts = [(step, f"{alert['title']}. {alert['text']}") for alert in row.get("alerts", ())]
    top_experts = list(row.get("pooled", {}).get("top_experts", of_run.top_experts))
    if "error" not in row:
        found = {task: point for task, of_task in _of_tasks(row) if (point := _trajectory_point(of_task)) is not None}
        of_run.points[step] = of_run.points.get(step, {}) | row["scalars"]
        for task, point in found.items():
            of_run.trajectories.setdefault(task, {})[step] = point
    of_run.top_experts = top_experts
    of_run.troubles += troubles
    of_run.alerts += alerts
    of_run.last_time = row.get("time", of_run.last_time)
    of_run.spent = spent


def _of_tasks(row: dict[str, Any]) -> list[tuple[str | None, dict[str, Any]]]:
    return [(None, row.get("pooled", {})), *row.get("tasks", {}).items()]


def _trajectory_point(of_task: dict[str, Any]) -> TrajectoryPoint | None:
    return TrajectoryPoint.from_dict(of_task["phase"]["point"]) if "phase" in of_task else None

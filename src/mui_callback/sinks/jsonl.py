"""The record of a run: one JSON object a line, for every point, whatever tracker there is."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mui_callback.metrics.trajectory import Trajectories, TrajectoryPoint
from mui_callback.sinks.base import ProbePoint, RunDescription
from mui_callback.spent import Spent
from mui_callback.task_report import TaskReport
from mui_callback.version import __version__


class JsonlSink:
    """Appends each point to a file as one line, handed to the system at once, whole or not at all.

    The first line of a run, ``{"run": …}``, says how it is probed; where training goes on after a pause, there is
    another one with the same ``id``. Each line after it holds the ``id``, ``step``, ``time`` (seconds since the epoch),
    ``spent`` (see `Spent`), ``scalars`` (the logged keys), and under ``tasks`` and ``pooled`` what is too much for a
    tracker: MUI by layer, the ten experts with the highest activated frequency, and the phase with the trends that it
    was called from. A failed probe has ``error`` and ``traceback`` instead. ``ablation`` holds the causal check after
    the last step, ``failures`` what went wrong besides the probe, and ``alerts`` what was told.

    Args:
        path: the file; its directory is made if it is not there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._id = ""
        self._untold: dict[str, Any] | None = None

    def open(self, run: RunDescription) -> None:
        """Append the line that describes the run."""
        self._id = run.id
        description = {"id": run.id, "start_step": run.start_step, "version": __version__, **run.to_dict()}
        self._untold = {"run": description}
        self._tell()

    def write(self, point: ProbePoint) -> None:
        """Append the point."""
        row: dict[str, Any] = {"id": self._id, "step": point.step, "time": time.time(), "spent": asdict(point.spent)}
        if point.error is not None:
            row |= {"error": point.error, "traceback": point.traceback}
        else:
            row["scalars"] = point.scalars
        if point.report is not None:
            row["pooled"] = _task(point.report.pooled)
            row["tasks"] = {name: _task(task) for name, task in point.report.tasks.items()}
        for task, phase in point.phases.items():
            of_task = row.setdefault("pooled", {}) if task is None else row.setdefault("tasks", {}).setdefault(task, {})
            of_task["phase"] = phase.to_dict()
        if point.ablation is not None:
            row["ablation"] = asdict(point.ablation)
        if point.failures:
            row["failures"] = dict(point.failures)
        if point.alerts:
            row["alerts"] = [asdict(alert) for alert in point.alerts]
        self._tell()
        self._append(row)

    def _tell(self) -> None:
        """Append the description, if that did not succeed before."""
        if self._untold is not None:
            self._append(self._untold)
            self._untold = None

    def _append(self, row: dict[str, Any]) -> None:
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            size = file.tell()
            if size and _last_byte(self.path) != b"\n":  # the writer before was killed
                line = b"\n" + line
            written = file.write(line)  # one system call: an interrupt comes before it or after it
            if written != len(line):
                file.truncate(size)
                raise OSError(f"{self.path}: only {written} of {len(line)} bytes could be written; is the disk full?")

    def close(self) -> None:
        """Nothing is left to do: every line is on disk."""


_PROBED = ("tasks", "probe_set", "settings", "layers")


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
    last_time: float | None = None
    """When the last point was written, in seconds since the epoch."""


def read_record(path: str | os.PathLike[str]) -> tuple[list[RecordedRun], list[str]]:
    """The runs in a record, in the order in which they began, and the lines of it that cannot be read, in words.

    Such a line, as one that was cut short, is left out. Without a file there are none of either.

    Raises:
        OSError: there is a file, but it cannot be read.
    """
    runs: list[RecordedRun] = []
    complaints: list[str] = []
    path = Path(path)
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        wrong = _read_line(line, runs) if line.strip() else None
        if wrong is not None:
            complaints.append(
                f"{path}, line {number}: expected a run or a point of one, got {line[:40]!r} ({wrong}); it is left out."
            )
    return runs, complaints


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
    top_experts = list(row.get("pooled", {}).get("top_experts", of_run.top_experts))
    if "error" not in row:
        found = {task: point for task, of_task in _of_tasks(row) if (point := _trajectory_point(of_task)) is not None}
        of_run.points[step] = of_run.points.get(step, {}) | row["scalars"]
        for task, point in found.items():
            of_run.trajectories.setdefault(task, {})[step] = point
    of_run.top_experts = top_experts
    of_run.troubles += troubles
    of_run.last_time = row.get("time", of_run.last_time)
    of_run.spent = spent


def _of_tasks(row: dict[str, Any]) -> list[tuple[str | None, dict[str, Any]]]:
    return [(None, row.get("pooled", {})), *row.get("tasks", {}).items()]


def _trajectory_point(of_task: dict[str, Any]) -> TrajectoryPoint | None:
    return TrajectoryPoint.from_dict(of_task["phase"]["point"]) if "phase" in of_task else None


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read()


def _task(task: TaskReport) -> dict[str, Any]:
    return {
        "layer_mui": [None if value is None else round(value, 6) for value in task.layer_mui],
        "top_experts": [
            {"expert": label, "activated_frequency": frequency, "expert_mui": mui}
            for label, frequency, mui in task.top_experts()
        ],
    }

"""The record of a run: one JSON object a line, for every point, whatever tracker there is."""

from __future__ import annotations

import json
import os
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mui_callback.sinks.base import ProbePoint, RunDescription
from mui_callback.spent import Spent
from mui_callback.task_report import TaskReport
from mui_callback.version import __version__


class JsonlSink:
    """Appends each point to a file as one line, on disk at once, whole or not at all.

    The first line of a run, ``{"run": …}``, says how it is probed; where training goes on after a pause, there is
    another one with the same ``id``. Each line after it holds ``step``, ``time`` (seconds since the epoch), ``scalars``
    (the logged keys), ``spent`` (see `Spent`), and under ``tasks`` and ``pooled`` what is too much for a tracker: MUI
    by layer and the ten experts with the highest activated frequency. A failed probe has ``error`` instead.

    Args:
        path: the file; its directory is made if it is not there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def open(self, run: RunDescription) -> None:
        """Append the line that describes the run."""
        description = {"id": run.id, "start_step": run.start_step, "version": __version__, **run.to_dict()}
        self._append({"run": description})

    def write(self, point: ProbePoint) -> None:
        """Append the point."""
        row: dict[str, Any] = {"step": point.step, "time": time.time(), "spent": asdict(point.spent)}
        if point.report is None:
            row["error"] = point.error
        else:
            row |= {"scalars": point.scalars, "pooled": _task(point.report.pooled)}
            row["tasks"] = {name: _task(task) for name, task in point.report.tasks.items()}
        self._append(row)

    def _append(self, row: dict[str, Any]) -> None:
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            if file.tell() and _last_byte(self.path) != b"\n":  # the writer before was killed, or the disk was full
                line = b"\n" + line
            written = file.write(line)  # one system call: an interrupt comes before it or after it
        if written != len(line):
            raise OSError(f"{self.path}: only {written} of {len(line)} bytes could be written; is the disk full?")

    def close(self) -> None:
        """Nothing is left to do: every line is on disk."""


@dataclass(frozen=True)
class RecordedRun:
    """What the record holds of one run, from its description to the next one."""

    id: str
    probed: dict[str, Any]
    """How it was probed; see `RunDescription.to_dict`."""
    points: dict[int, dict[str, float]] = field(default_factory=dict)
    """Scalars by step, without the probes that failed."""
    spent: Spent = field(default_factory=Spent)
    """Up to its last point."""


def read_record(path: str | os.PathLike[str]) -> list[RecordedRun]:
    """The runs in a record, in their order; none if there is no such file.

    A line that cannot be read, as one that a full disk cut short, is warned about and left out.
    """
    path = Path(path)
    runs: list[RecordedRun] = []
    if not path.is_file():
        return runs
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            _read_line(json.loads(line), runs)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            warnings.warn(
                f"{path}, line {number}: expected a run or a point of one, got {line[:40]!r} "
                f"({type(error).__name__}: {error}); it is left out.",
                stacklevel=2,
            )
    return runs


def _read_line(row: dict[str, Any], runs: list[RecordedRun]) -> None:
    if "run" in row:
        run = row["run"]
        probed = {name: run[name] for name in ("tasks", "probe_set", "settings", "layers")}
        runs.append(RecordedRun(run.get("id", ""), probed))
        return
    runs[-1] = RecordedRun(
        runs[-1].id,
        runs[-1].probed,
        runs[-1].points | ({} if "error" in row else {int(row["step"]): dict(row["scalars"])}),
        Spent(**row.get("spent", {})),
    )


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read()


def _task(task: TaskReport) -> dict[str, Any]:
    return {
        "layer_mui": [round(value, 6) for value in task.layer_mui.tolist()],
        "top_experts": [
            {"expert": label, "activated_frequency": frequency, "expert_mui": mui}
            for label, frequency, mui in task.top_experts()
        ],
    }

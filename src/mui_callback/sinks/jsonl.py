"""The record of a run: one JSON object a line, for every point, whatever tracker there is."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mui_callback.sinks.base import ProbePoint, RunDescription
from mui_callback.task_report import TaskReport
from mui_callback.version import __version__


class JsonlSink:
    """Appends each point to a file as one line, flushed at once.

    The first line of a run, ``{"run": …}``, says how it is probed. Each line after it holds ``step``, ``time`` (seconds
    since the epoch), ``scalars`` (the logged keys), and under ``tasks`` and ``pooled`` what is too much for a tracker:
    MUI by layer and the ten experts with the highest activated frequency.
    A failed probe has ``error`` instead.

    Args:
        path: the file; its directory is made if it is not there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def open(self, run: RunDescription) -> None:
        """Append the line that describes the run."""
        description = {
            "version": __version__,
            "tasks": run.task_names,
            "probe_set": run.probe_set,
            "settings": asdict(run.settings),
            "layers": [asdict(layer) for layer in run.layout.layers],
        }
        self._append({"run": description})

    def write(self, point: ProbePoint) -> None:
        """Append the point."""
        row: dict[str, Any] = {"step": point.step, "time": time.time()}
        if point.report is None:
            row["error"] = point.error
        else:
            row |= {"scalars": point.scalars, "pooled": _task(point.report.pooled)}
            row["tasks"] = {name: _task(task) for name, task in point.report.tasks.items()}
        self._append(row)

    def _append(self, row: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def close(self) -> None:
        """Nothing is left to do: every line is on disk."""


def _task(task: TaskReport) -> dict[str, Any]:
    return {
        "layer_mui": [round(value, 6) for value in task.layer_mui.tolist()],
        "top_experts": [
            {"expert": label, "activated_frequency": frequency, "expert_mui": mui}
            for label, frequency, mui in task.top_experts()
        ],
    }

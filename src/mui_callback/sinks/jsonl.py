"""The record of a run: one JSON object a line, for every point, whatever tracker there is."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mui_callback.json_lines import append_line
from mui_callback.sinks.base import ProbePoint, RunDescription
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
        append_line(self.path, row)

    def _tell(self) -> None:
        """Append the description, if that did not succeed before."""
        if self._untold is not None:
            append_line(self.path, self._untold)
            self._untold = None

    def close(self) -> None:
        """Nothing is left to do: every line is on disk."""


def _task(task: TaskReport) -> dict[str, Any]:
    return {
        "layer_mui": [None if value is None else round(value, 6) for value in task.layer_mui],
        "top_experts": [
            {"expert": label, "activated_frequency": frequency, "expert_mui": mui}
            for label, frequency, mui in task.top_experts()
        ],
    }

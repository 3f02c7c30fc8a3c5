"""The record of a run: one JSON object a line, for every point, whatever tracker there is."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mui_callback import __version__
from mui_callback.report import MUIReport
from mui_callback.sinks.base import ProbePoint
from mui_callback.task_report import TaskReport


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
        self._described = False

    def write(self, point: ProbePoint) -> None:
        """Append the point."""
        rows: list[dict[str, Any]] = []
        row: dict[str, Any] = {"step": point.step, "time": time.time()}
        if point.report is None:
            row["error"] = point.error
        else:
            if not self._described:
                rows.append({"run": _description(point.report)})
            row |= {"scalars": point.scalars, "pooled": _task(point.report.pooled)}
            row["tasks"] = {name: _task(task) for name, task in point.report.tasks.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in [*rows, row]))
        self._described = self._described or bool(rows)

    def close(self) -> None:
        """Nothing is left to do: every line is on disk."""


def _description(report: MUIReport) -> dict[str, Any]:
    return {
        "version": __version__,
        "tasks": list(report.task_names),
        "settings": asdict(report.settings),
        "layers": [layer.to_dict() for layer in report.layout.layers],
    }


def _task(task: TaskReport) -> dict[str, Any]:
    return {
        "layer_mui": [round(value, 6) for value in task.layer_mui.tolist()],
        "top_experts": [
            {"expert": label, "activated_frequency": frequency, "expert_mui": mui}
            for label, frequency, mui in task.top_experts()
        ],
    }

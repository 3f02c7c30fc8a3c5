"""Values in the MLflow run that the trainer logs to."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

from mui_callback.sinks.base import ProbePoint, RunDescription

_NOT_IN_NAMES = re.compile(r"[^\w\-. /]")
"""What MLflow does not take in the name of a metric; on Windows it does not take a colon either."""


class MLflowSink:
    """Logs each point to the active run of MLflow, if there is one, in MLflow's own thread.

    What its names of metrics cannot have, such as a question mark in the name of a task, becomes ``_``. Names that are
    one then are told apart by a number.
    """

    name = "MLflow"

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def open(self, run: RunDescription) -> None:
        """Nothing to do: the trainer may not have started its run yet."""

    def write(self, point: ProbePoint) -> None:
        """Log the scalars at the step of the point; a failed probe logs nothing."""
        mlflow: Any = sys.modules.get("mlflow")
        if mlflow is None or not point.scalars or mlflow.active_run() is None:
            return
        mlflow.log_metrics(self._renamed(point.scalars), step=point.step, synchronous=False)

    def _renamed(self, scalars: Mapping[str, float]) -> dict[str, float]:
        for key in scalars:
            if key not in self._names:
                name = _NOT_IN_NAMES.sub("_", key)
                taken = sum(_NOT_IN_NAMES.sub("_", other) == name for other in self._names)
                self._names[key] = f"{name}_{taken + 1}" if taken else name
        return {self._names[key]: value for key, value in scalars.items()}

    def close(self) -> None:
        """The run belongs to the trainer, which ends it."""

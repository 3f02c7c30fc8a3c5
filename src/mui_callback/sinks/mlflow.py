"""Values in the MLflow run that the trainer logs to."""

from __future__ import annotations

import re
import sys
from typing import Any

from mui_callback.sinks.base import ProbePoint, RunDescription

_NOT_IN_NAMES = re.compile(r"[^0-9A-Za-z_\-. :/]")
"""What MLflow does not take in the name of a metric."""


class MLflowSink:
    """Logs each point to the active run of MLflow, if there is one, in MLflow's own thread.

    What its names of metrics cannot have, such as letters that are not ASCII in the name of a task, becomes ``_``.
    """

    name = "MLflow"

    def open(self, run: RunDescription) -> None:
        """Nothing to do: the trainer may not have started its run yet."""

    def write(self, point: ProbePoint) -> None:
        """Log the scalars at the step of the point; a failed probe logs nothing."""
        mlflow: Any = sys.modules.get("mlflow")
        if mlflow is None or not point.scalars or mlflow.active_run() is None:
            return
        metrics = {_NOT_IN_NAMES.sub("_", key): value for key, value in point.scalars.items()}
        mlflow.log_metrics(metrics, step=point.step, synchronous=False)

    def close(self) -> None:
        """The run belongs to the trainer, which ends it."""

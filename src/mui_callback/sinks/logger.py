"""Values in a logger of Lightning's: for TensorBoard, CSV, MLflow, W&B and whatever else there is one for."""

from __future__ import annotations

from typing import Any

from mui_callback.sinks.base import ProbePoint, RunDescription
from mui_callback.sinks.step_keys import LIGHTNING_STEP_KEY
from mui_callback.sinks.wandb_metrics import MetricDefinitions, tell_wandb


class LoggerSink:
    """Logs the scalars of each point to a logger.

    Args:
        logger: a logger of Lightning or Fabric, or anything else with ``log_metrics(metrics, step)``.
    """

    def __init__(self, logger: Any) -> None:
        self.logger = logger
        self.name = type(logger).__name__
        self.step: int | None = None
        """Of the next point, on the logger's x axis; None for the optimizer steps done."""
        self._metrics = MetricDefinitions(LIGHTNING_STEP_KEY)

    @property
    def is_wandb(self) -> bool:
        """Whether it takes what W&B takes."""
        return any(of.__name__ == "WandbLogger" for of in type(self.logger).__mro__)

    def open(self, run: RunDescription) -> None:
        """Nothing to do: whoever trains has made the logger."""

    def write(self, point: ProbePoint) -> None:
        """Log the scalars; a failed probe has none."""
        if point.alerts and self.is_wandb:
            tell_wandb(self.logger.experiment, point.alerts)
        if point.scalars:
            if self.is_wandb and not self.logger._wandb_init.get("sync_tensorboard"):
                self._metrics.define(self.logger.experiment, point.scalars)
            self.logger.log_metrics(point.scalars, step=point.step if self.step is None else self.step)

    def close(self) -> None:
        """The logger belongs to whoever trains, who closes it."""

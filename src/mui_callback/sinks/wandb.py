"""Values in the Weights & Biases run that the trainer logs to."""

from __future__ import annotations

import sys
from typing import Any

from mui_callback.sinks.base import ProbePoint, RunDescription
from mui_callback.sinks.step_keys import OWN_STEP_KEY
from mui_callback.sinks.wandb_metrics import MetricDefinitions, tell_wandb


class WandbSink:
    """Logs each point to the active run, ``wandb.run``, on the same x axis as the loss.

    Nothing is imported and no run is started: without an active run nothing is logged.

    Args:
        step_key: the metric that is the x axis (of the HF Trainer: ``train/global_step``).
    """

    def __init__(self, step_key: str = OWN_STEP_KEY) -> None:
        self.step_key = step_key
        self._metrics = MetricDefinitions(step_key)
        self._unfinished_row: int | None = None

    def open(self, run: RunDescription) -> None:
        """Nothing to do: the trainer may not have started its run yet."""

    def write(self, point: ProbePoint) -> None:
        """Log the scalars of the point; a failed probe has none."""
        run = active_run()
        if run is None:
            return
        tell_wandb(run, point.alerts)
        if not point.scalars:
            return
        self._metrics.define(run, point.scalars)
        self._finish_row(run)
        # Whoever logs with `wandb.log(..., step=0)` after the point of the untrained model would find that step taken,
        # and lose the row. So it waits for theirs.
        waits = self.step_key == OWN_STEP_KEY and point.step == 0
        run.log({**point.scalars, self.step_key: point.step}, commit=not waits)
        self._unfinished_row = run.step if waits else None

    def _finish_row(self, run: Any) -> None:
        if self._unfinished_row == run.step:
            run.log({}, commit=True)

    def close(self) -> None:
        """The run belongs to the trainer, which ends it."""


def active_run() -> Any:
    """``wandb.run``; None without one, or where W&B was never imported."""
    return getattr(sys.modules.get("wandb"), "run", None)

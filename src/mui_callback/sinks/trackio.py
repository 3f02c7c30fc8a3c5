"""Values in the Trackio run that the trainer logs to."""

from __future__ import annotations

import sys
from typing import Any

from mui_callback.sinks.base import ProbePoint, RunDescription
from mui_callback.sinks.step_keys import OWN_STEP_KEY


class TrackioSink:
    """Logs each point to the active run of Trackio, if there is one.

    Args:
        step_key: the metric that is the x axis (of the HF Trainer: ``train/global_step``).
    """

    name = "Trackio"

    def __init__(self, step_key: str = OWN_STEP_KEY) -> None:
        self.step_key = step_key

    def open(self, run: RunDescription) -> None:
        """Nothing to do: the trainer may not have started its run yet."""

    def write(self, point: ProbePoint) -> None:
        """Log the scalars of the point; a failed probe has none."""
        trackio: Any = sys.modules.get("trackio")
        if trackio is None or trackio.context_vars.current_run.get() is None:
            return
        for alert in point.alerts:
            level = trackio.AlertLevel.ERROR if alert.is_bad else trackio.AlertLevel.WARN
            trackio.alert(alert.title, alert.text, level=level)
        if point.scalars:
            trackio.log({**point.scalars, self.step_key: point.step})

    def close(self) -> None:
        """The run belongs to the trainer, which ends it."""

"""What W&B is told of each key: its x axis, what sums up a run, and whether it has a panel of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mui_callback.metrics.catalogue import PREFIX, metric_of
from mui_callback.sinks.base import Alert


class MetricDefinitions:
    """Defines keys in a W&B run, each when it is first logged.

    A run is summed up by the last value of a key; a loss also by its lowest, ``<key>.min``, an accuracy by its highest
    (which makes the last one ``<key>.last``); see `Metric.summary`. In the automatic workspace W&B makes a panel for
    each key but those that are not `Metric.is_plotted`.

    Args:
        step_key: the metric that is the x axis.
    """

    def __init__(self, step_key: str) -> None:
        self.step_key = step_key
        self._run_id: str | None = None
        self._defined: set[str] = set()

    def define(self, run: Any, keys: Iterable[str]) -> None:
        """Define those that are new.

        Args:
            run: of W&B.
            keys: that are about to be logged.
        """
        if self._run_id != run.id:
            self._run_id, self._defined = run.id, set()
            # W&B's own counter must not be used: rows behind it would be dropped.
            run.define_metric(self.step_key, hidden=self.step_key.startswith(f"{PREFIX}/"))
            run.define_metric(f"{PREFIX}/*", step_metric=self.step_key, step_sync=True)
        for key in keys:
            if key not in self._defined:
                self._defined.add(key)
                self._define(run, key)

    def _define(self, run: Any, key: str) -> None:
        metric = metric_of(key)
        # in a definition, an asterisk stands for any characters
        if metric is None or (metric.summary is None and metric.is_plotted) or "*" in key:
            return
        summary = None if metric.summary is None else f"{metric.summary},last"
        # What is defined by name takes nothing from what is defined for all.
        run.define_metric(
            key, step_metric=self.step_key, step_sync=True, summary=summary, hidden=not metric.is_plotted or None
        )


def tell_wandb(run: Any, alerts: Iterable[Alert]) -> None:
    """Send alerts, which W&B passes on by mail or Slack if its user has it set so; it does not wait for the server."""
    for alert in alerts:
        run.alert(title=alert.title, text=alert.text, level="ERROR" if alert.is_bad else "WARN")

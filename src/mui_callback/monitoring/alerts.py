"""Alerts of a run under way: in the log, and for the trackers that have alerts."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping

from mui_callback.forgiving import attempt, described
from mui_callback.monitoring.alert_rule import AlertRule, Scalars, alerts_at
from mui_callback.sinks.base import Alert

logger = logging.getLogger(__name__)

_HOUR = 3600.0


class Alerts:
    """Decides at each point what is told, and writes it to the log.

    Args:
        wanted: a rule, True for the default one, False for no alerts.
        budget: see `alerts_at`.
        is_main: whether this process tells anything.
    """

    def __init__(self, wanted: AlertRule | bool, budget: float | None, *, is_main: bool) -> None:
        self._rule = AlertRule() if wanted is True else wanted
        self._budget = budget
        self._is_main = is_main
        self._told: deque[float] = deque()

    def at(self, step: int, points: Mapping[int, Scalars]) -> tuple[Alert, ...]:
        """What the trackers are to tell of a point; see `alerts_at`."""
        if not self._rule or not self._is_main:
            return ()
        rule = self._rule
        found, error = attempt(lambda: alerts_at(step, points, self._budget, rule))
        if error is not None:
            logger.warning("MUI at step %d: no alerts. %s", step, described(error))
        for alert in found or ():
            logger.warning("%s. %s", alert.title, alert.text)
        return self._allowed(found or ())

    def of_failure(self, step: int, message: str) -> tuple[Alert, ...]:
        """The same, where a probe failed and no more are made, which is a warning already."""
        if not self._rule or not self._is_main:
            return ()
        text = f"No more are made after step {step}. {message}"
        return self._allowed((Alert("failure", step, "MUI: probes fail", text, is_bad=True),))

    def _allowed(self, alerts: tuple[Alert, ...]) -> tuple[Alert, ...]:
        """Those that are not too many."""
        allowed: list[Alert] = []
        for alert in alerts:
            now = time.monotonic()
            while self._told and now - self._told[0] > _HOUR:
                self._told.popleft()
            if self._rule and len(self._told) < self._rule.per_hour:
                self._told.append(now)
                allowed.append(alert)
        return tuple(allowed)

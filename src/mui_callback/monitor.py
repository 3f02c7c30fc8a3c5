"""Probing a training run: measure when it is due, hand the point on, and never harm the training.

This is all that a trainer's callback wires up; it knows no trainer.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from mui_callback.probe.freeze import random_state_kept
from mui_callback.report import MUIReport
from mui_callback.schedule import Schedule
from mui_callback.sinks.base import ProbePoint, RunDescription, Sink

logger = logging.getLogger(__name__)

OnError = Literal["warn", "raise"]


class Monitor:
    """Measures at the steps of a schedule and writes every point to the sinks.

    Args:
        measure: makes one report, and leaves no trace in the model.
        schedule: when to probe.
        sinks: where points go; none on processes other than the main one.
        run: what they are told first.
        on_error: what happens if a measurement fails. ``"warn"``: a warning, and a point that says so; training
            goes on. ``"raise"``: the exception, after the point was written.
    """

    def __init__(
        self,
        measure: Callable[[], MUIReport],
        schedule: Schedule,
        sinks: Sequence[Sink],
        run: RunDescription,
        *,
        on_error: OnError = "warn",
    ) -> None:
        self.measure = measure
        self.schedule = schedule
        self.sinks = tuple(sinks)
        self.on_error = on_error
        self.last_step: int | None = None
        self._complained: set[int] = set()
        with random_state_kept():
            for sink in self.sinks:
                self._try(sink, partial(sink.open, run))

    def step(self, step: int, *, is_last: bool = False) -> None:
        """To be called after each optimizer step, and with 0 before the first; does nothing if no probe is due."""
        if step != self.last_step and self.schedule.is_due(step, is_last=is_last):
            self.last_step = step
            with random_state_kept():
                self._probe(step)

    def close(self) -> None:
        """To be called once, after training."""
        with random_state_kept():
            for sink in self.sinks:
                self._try(sink, sink.close)

    def _probe(self, step: int) -> None:
        try:
            report = self.measure()
            point = ProbePoint(step, report=report, scalars=report.scalars())
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            self._write(ProbePoint(step, error=reason))
            if self.on_error == "raise":
                raise
            _warn(f"MUI probe at step {step} failed; training goes on. {reason}")
            logger.debug("MUI probe at step %d failed", step, exc_info=True)
            return
        if report.not_finite:
            _warn(f"MUI probe at step {step}: {report.not_finite} contributions or token losses are NaN or infinite.")
        self._write(point)

    def _write(self, point: ProbePoint) -> None:
        for sink in self.sinks:
            self._try(sink, partial(sink.write, point))

    def _try(self, sink: Sink, action: Callable[[], None]) -> None:
        """Nothing that a sink does may stop the training; one warning for each sink."""
        try:
            action()
        except Exception as error:
            if id(sink) not in self._complained:
                self._complained.add(id(sink))
                _warn(f"{type(sink).__name__} failed: {type(error).__name__}: {error}")


def _warn(message: str) -> None:
    """A warning that stays one where warnings are turned into errors."""
    try:
        warnings.warn(message, stacklevel=3)
    except Warning:
        logger.warning(message)

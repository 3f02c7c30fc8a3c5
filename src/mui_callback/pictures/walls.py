"""Where pictures are hung: W&B runs, whoever made them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from mui_callback.sinks.base import Sink
from mui_callback.sinks.wandb import OWN_STEP_KEY, WandbSink

logger = logging.getLogger(__name__)

Hang = Callable[[Mapping[str, Any], bool], None]
"""Logs values at the place of one point. The flag says that nothing of ours comes after them."""


class Wall(Protocol):
    """Where pictures are hung."""

    def place(self, step: int) -> Hang | None:
        """Where those of the point that is made now will belong; None if there is no run.

        Args:
            step: optimizer steps done.
        """


class ActiveRun:
    """The active W&B run, on the x axis of its scalars (see `WandbSink`, which defines it).

    Args:
        step_key: the metric that is the x axis.
    """

    def __init__(self, step_key: str = OWN_STEP_KEY) -> None:
        self.step_key = step_key

    def place(self, step: int) -> Hang | None:
        """In the run that is active now, as long as it is."""
        run = _active_run()
        if run is None:
            return None

        def hang(values: Mapping[str, Any], is_end: bool) -> None:
            if _active_run() is not run:
                logger.info("MUI: the W&B run ended before the pictures of step %d were logged", step)
                return
            # Whoever logs with `step=` finds no step taken at the end: the row stays open for theirs, or for the end.
            run.log({**values, self.step_key: step}, commit=not (is_end and self.step_key == OWN_STEP_KEY))

        return hang


class LoggerRun:
    """The run of a `WandbLogger` of Lightning.

    Args:
        logger: the logger.
        step_now: where the point that is made now is on the logger's x axis; None for the optimizer steps done.
    """

    def __init__(self, logger: Any, step_now: Callable[[], int | None]) -> None:
        self._logger = logger
        self._step_now = step_now

    def place(self, step: int) -> Hang:
        """At the x of this point's scalars."""
        now = self._step_now()
        x = step if now is None else now
        return lambda values, _: self._logger.log_metrics(values, step=x)


def walls_of(trackers: Sequence[Sink]) -> list[Wall]:
    """Those of the trackers that are W&B's: the active run, and loggers of Lightning (which have a `logger`, and the x
    of the next point as `step`)."""
    walls: list[Wall] = []
    for sink in trackers:
        of_lightning = getattr(sink, "logger", None)
        if isinstance(sink, WandbSink):
            walls.append(ActiveRun(sink.step_key))
        elif any(of.__name__ == "WandbLogger" for of in type(of_lightning).__mro__):
            walls.append(LoggerRun(of_lightning, partial(getattr, sink, "step")))
    return walls


def _active_run() -> Any:
    return getattr(sys.modules.get("wandb"), "run", None)

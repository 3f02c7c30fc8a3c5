"""Where pictures are hung: W&B runs, whoever made them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from mui_callback.pictures.scene import PICTURE_STEP_KEY
from mui_callback.sinks.base import Sink, TrackerError
from mui_callback.sinks.logger import LoggerSink
from mui_callback.sinks.step_keys import OWN_STEP_KEY
from mui_callback.sinks.wandb import WandbSink, active_run

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
    """The active W&B run.

    Args:
        sink: which logs the scalars.
    """

    def __init__(self, sink: WandbSink) -> None:
        self._sink = sink
        self._axis = _PictureAxis()

    def place(self, step: int) -> Hang | None:
        """In the run that is active now, as long as it is, at the step."""
        run = active_run()
        if run is None:
            return None

        def hang(values: Mapping[str, Any], is_end: bool) -> None:
            if active_run() is not run:
                logger.info("MUI: the W&B run ended before the pictures of step %d were logged", step)
                return
            # Whoever logs with `step=` finds no step taken at the end: the row stays open for theirs, or for the end.
            with _as_of(self._sink):
                self._axis.log(run, values, step, commit=not (is_end and self._sink.step_key == OWN_STEP_KEY))

        return hang


class LoggerRun:
    """The run of a `WandbLogger` of Lightning.

    Args:
        sink: which logs the scalars to it.
    """

    def __init__(self, sink: LoggerSink) -> None:
        self._sink = sink
        self._axis = _PictureAxis()

    def place(self, step: int) -> Hang:
        """At the x of this point's scalars, in Lightning's counting."""
        x = step if self._sink.step is None else self._sink.step

        def hang(values: Mapping[str, Any], is_end: bool) -> None:
            with _as_of(self._sink):
                self._axis.log(self._sink.logger.experiment, values, x, commit=True)

        return hang


class _PictureAxis:
    """Logs on an x axis that only pictures have."""

    def __init__(self) -> None:
        self._defined: set[tuple[str, str]] = set()

    def log(self, run: Any, values: Mapping[str, Any], x: int, *, commit: bool) -> None:
        for name in (PICTURE_STEP_KEY, *values):
            if (run.id, name) not in self._defined:
                self._defined.add((run.id, name))
                if name == PICTURE_STEP_KEY:
                    run.define_metric(name, hidden=True)
                else:
                    run.define_metric(name, step_metric=PICTURE_STEP_KEY, step_sync=False)
        run.log({**values, PICTURE_STEP_KEY: x}, commit=commit)


@contextmanager
def _as_of(sink: Sink) -> Iterator[None]:
    """What is raised inside is the trouble of a tracker."""
    try:
        yield
    except Exception as error:
        raise TrackerError(sink) from error


def walls_of(trackers: Sequence[Sink]) -> list[Wall]:
    """Those of the trackers that are W&B's: the active run, and loggers of Lightning."""
    walls: list[Wall] = []
    for sink in trackers:
        if isinstance(sink, WandbSink):
            walls.append(ActiveRun(sink))
        elif isinstance(sink, LoggerSink) and sink.is_wandb:
            walls.append(LoggerRun(sink))
    return walls

"""Handing what was found to the sinks, each whatever the others do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

from mui_callback.forgiving import attempt, described, warn
from mui_callback.sinks.base import Sink, TrackerError

logger = logging.getLogger(__name__)


class Delivery:
    """Tells every sink the same, and complains once about each that fails.

    Args:
        sinks: in the order in which they are told.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = tuple(sinks)
        self._complained: set[int] = set()
        self._with_more_to_do = [sink for sink in self.sinks if hasattr(sink, "between_points")]

    def tell(self, action: Callable[[Sink], None]) -> Exception | None:
        """Do something with each of them.

        Returns:
            The first exception, after all were told; that of an optional sink (pictures) is none.
        """
        first: Exception | None = None
        for sink in self.sinks:
            error = self._attempt(sink, partial(action, sink))
            if not getattr(sink, "is_optional", False):
                first = first or error
        return first

    def between_points(self) -> None:
        """Let those that have something to do between points do it."""
        for sink in self._with_more_to_do:
            self._attempt(sink, sink.between_points)

    def _attempt(self, sink: Sink, action: Callable[[], None]) -> Exception | None:
        error = attempt(action)[1]
        if isinstance(error, TrackerError) and isinstance(error.__cause__, Exception):
            sink, error = error.sink, error.__cause__
        if error is not None:
            self._complain(sink, error)
        return error

    def _complain(self, sink: Sink, error: Exception) -> None:
        message = f"{getattr(sink, 'name', type(sink).__name__)} failed: {described(error)}"
        if id(sink) in self._complained:
            logger.info(message)
        else:
            self._complained.add(id(sink))
            warn(message)

"""Handing what was found to the sinks, each whatever the others do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

from mui_callback.forgiving import attempt, described, warn
from mui_callback.sinks.base import Sink

logger = logging.getLogger(__name__)


class Delivery:
    """Tells every sink the same, and complains once about each that fails.

    Args:
        sinks: in the order in which they are told.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = tuple(sinks)
        self._complained: set[int] = set()

    def tell(self, action: Callable[[Sink], None]) -> Exception | None:
        """Do something with each of them.

        Returns:
            The first exception, after all were told.
        """
        first: Exception | None = None
        for sink in self.sinks:
            error = attempt(partial(action, sink))[1]
            if error is not None:
                self._complain(sink, error)
            first = first or error
        return first

    def _complain(self, sink: Sink, error: Exception) -> None:
        message = f"{getattr(sink, 'name', type(sink).__name__)} failed: {described(error)}"
        if id(sink) in self._complained:
            logger.info(message)
        else:
            self._complained.add(id(sink))
            warn(message)

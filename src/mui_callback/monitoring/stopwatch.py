"""How long a run has trained, and how long it has been probed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from mui_callback.spent import Spent


class Stopwatch:
    """Tells the time in probes from the time in training, evaluation and whatever else a run does.

    It starts when it is made.

    Args:
        start_step: optimizer steps done so far.
        before: what was spent before, where training goes on.
    """

    def __init__(self, start_step: int, before: Spent | None = None) -> None:
        self._before = before or Spent()
        self.step = start_step
        """Optimizer steps done; whoever trains sets it."""
        self._start_step = start_step
        self._start = time.perf_counter()
        self._probing = 0.0
        self._last_probe = self._before.last_probe
        self._probe_start: float | None = None
        self._apart = 0.0

    @contextmanager
    def probing(self) -> Iterator[None]:
        """What happens inside is a probe."""
        self._probe_start = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - self._probe_start
            self._probing += took
            self._last_probe = took - self._apart
            self._probe_start, self._apart = None, 0.0

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What happens inside is time in probes, but does not tell what the next one will take."""
        start = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - start
            if self._probe_start is None:
                self._probing += took
            else:
                self._apart += took

    @property
    def spent(self) -> Spent:
        """Up to now, a probe that is under way included."""
        now = time.perf_counter()
        this_probe = None if self._probe_start is None else now - self._probe_start
        probing = self._probing + (this_probe or 0.0)
        return Spent(
            steps=self._before.steps + self.step - self._start_step,
            training=self._before.training + now - self._start - probing,
            probing=self._before.probing + probing,
            last_probe=self._last_probe if this_probe is None else this_probe - self._apart,
        )

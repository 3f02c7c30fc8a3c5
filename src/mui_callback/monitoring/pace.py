"""Whether a probe is due now: the schedule, the watch that a budget needs, and one answer for all processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mui_callback.monitoring.schedule import Schedule
from mui_callback.monitoring.stopwatch import Stopwatch
from mui_callback.parallel.processes import Processes
from mui_callback.spent import Spent


class Pace:
    """Decides step by step; a step that was asked about is not due again.

    Args:
        schedule: what is asked for.
        stopwatch: how long training and probes have taken; only that of the main process is looked at.
        processes: all that have to decide alike.
    """

    def __init__(self, schedule: Schedule, stopwatch: Stopwatch, processes: Processes) -> None:
        self.schedule = schedule
        self.stopwatch = stopwatch
        self._processes = processes
        self._last_due: int | None = None
        self._next_look = 0
        self._look_again(stopwatch.step)

    @property
    def spent(self) -> Spent:
        """The time that the run has taken up to now."""
        return self.stopwatch.spent

    def is_due(self, step: int, *, evaluated: bool, last: bool, needed: bool = False) -> bool:
        """Whether to probe after this many optimizer steps.

        Args:
            step: optimizer steps done.
            evaluated: whether the trainer has just evaluated.
            last: whether training ends here.
            needed: whether a probe is to be made whatever the schedule says.
        """
        previous, self.stopwatch.step = self.stopwatch.step, step
        if step == self._last_due:
            return False
        if needed or self.schedule.is_due(step, previous=previous, evaluated=evaluated, last=last):
            self._last_due = step
        elif self.schedule.is_auto and step >= self._next_look:
            if self._processes.from_main(lambda: self.schedule.affords(self.spent)):
                self._last_due = step
            else:
                self._look_again(step)
        return step == self._last_due

    @contextmanager
    def probing(self, step: int, *, last: bool) -> Iterator[None]:
        """What happens inside is the probe at a step that was due, or the reason to do without it."""
        with self.stopwatch.probing():
            yield
        if not last:  # the process that holds the store may be gone before the others have asked it
            self._look_again(step)

    def skip(self, step: int) -> None:
        """Do without the probe at a step that was due."""
        self._look_again(step)

    def _look_again(self, step: int) -> None:
        if self.schedule.is_auto:
            self._next_look = self._processes.from_main(lambda: self.schedule.next_look(step, self.spent))

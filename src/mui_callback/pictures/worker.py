"""A thread that works for the training thread, which never waits for it but at the end, and then not for long."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from threading import Condition, Thread
from typing import Generic, TypeVar

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")
_MOST_FINISHED = 4
"""Results that wait to be taken."""


class Worker(Generic[_Job, _Result]):
    """Does one job at a time, in the order in which they came.

    One job may wait while another is done. If a third comes, the one that waits is dropped for it, so that a worker
    that is slower than its jobs come does the newest, and what it holds is bounded; the same holds for results that
    nobody takes.

    Args:
        work: does a job. What it raises is kept for `take`.
        name: of the thread.
    """

    def __init__(self, work: Callable[[_Job], _Result], name: str) -> None:
        self._work = work
        self._name = name
        self._changed = Condition()
        self._waiting: deque[_Job] = deque(maxlen=1)
        self._finished: deque[_Result] = deque(maxlen=_MOST_FINISHED)
        self._error: Exception | None = None
        self._is_busy, self._is_closed = False, False
        self._thread: Thread | None = None
        self.n_dropped = 0
        """Jobs that were never done."""

    def submit(self, job: _Job) -> None:
        """Have a job done; returns at once. The thread begins with the first."""
        with self._changed:
            if self._is_closed:
                return
            self.n_dropped += len(self._waiting)
            self._waiting.append(job)
            self._changed.notify_all()
            if self._thread is None:
                # A daemon: Python's exit does not wait for it, whatever became of the training.
                self._thread = Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()

    @property
    def has_news(self) -> bool:
        """Whether there is anything to take."""
        with self._changed:
            return bool(self._finished) or self._error is not None

    def take(self) -> tuple[list[_Result], Exception | None]:
        """What is finished, the oldest first, and what the last job that failed raised."""
        with self._changed:
            error, self._error = self._error, None
            results = list(self._finished)
            self._finished.clear()
        return results, error

    def close(self, timeout: float) -> bool:
        """Take no more jobs, and wait for those that there are.

        Args:
            timeout: seconds.

        Returns:
            Whether all are done; what is not by then is never.
        """
        with self._changed:
            self._is_closed = True
            is_done = self._changed.wait_for(lambda: not (self._waiting or self._is_busy), timeout)
            self._waiting.clear()
            self._changed.notify_all()
        return is_done

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if not self._waiting:
                    return
                job = self._waiting.popleft()
                self._is_busy = True
            result, error = self._do(job)
            with self._changed:
                self._is_busy = False
                if error is not None:
                    self._error = error
                elif result is not None:
                    self._finished.append(result)
                self._changed.notify_all()

    def _do(self, job: _Job) -> tuple[_Result | None, Exception | None]:
        try:
            return self._work(job), None
        except Exception as error:
            return None, error

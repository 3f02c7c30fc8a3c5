"""Downloads beside the measuring: the next checkpoint comes while one is measured, and old ones go."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from threading import Thread
from types import TracebackType

from mui_callback.forgiving import attempt, described, warn
from mui_callback.trajectory.places import Place

_Job = tuple[Future[object], Callable[[], object]]


class Fetching:
    """One thread that downloads and deletes, one after the other: revisions share files in the cache of the hub.

    On the disk are, of what it has downloaded, the checkpoint that is measured, the next one, and those that are kept.

    Args:
        keep: checkpoints that stay after they are measured; None for all.
    """

    def __init__(self, keep: int | None) -> None:
        self._keep = keep
        self._measured: deque[Place] = deque()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name="mui-fetch", daemon=True)
        self._thread.start()

    def fetch(self, place: Place, following: Place | None) -> None:
        """Wait until a checkpoint is on this machine, and have the following one come meanwhile.

        Raises:
            Exception: it cannot be had.
        """
        self._submit(place.fetch).result()
        if following is not None:
            self._submit(partial(attempt, following.fetch))  # what goes wrong is raised when it is its turn

    def let_go(self, place: Place) -> None:
        """A checkpoint is measured, or cannot be."""
        self._measured.append(place)
        while self._keep is not None and len(self._measured) > self._keep:
            self._submit(partial(_delete, self._measured.popleft()))

    def __enter__(self) -> Fetching:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._jobs.put(None)
        if error is None:  # whoever interrupts a study does not wait for a download
            self._thread.join()

    def _submit(self, action: Callable[[], object]) -> Future[object]:
        future: Future[object] = Future()
        self._jobs.put((future, action))
        return future

    def _work(self) -> None:
        for future, action in iter(self._jobs.get, None):
            result, error = attempt(action)
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)


def _delete(place: Place) -> None:
    _, error = attempt(place.let_go)
    if error is not None:
        warn(f"a downloaded checkpoint could not be deleted ({described(error)})")

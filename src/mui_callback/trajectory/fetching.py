"""Downloads beside the measuring: the next checkpoint comes while one is measured, and old ones go."""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from mui_callback.forgiving import attempt, described, warn
from mui_callback.trajectory.places import Place


class Fetching:
    """One thread that downloads and deletes, one after the other: revisions share files in the cache of the hub.

    On the disk are, of what it has downloaded, the checkpoint that is measured, the next one, and those that are kept.

    Args:
        keep: checkpoints that stay after they are measured; None for all.
    """

    def __init__(self, keep: int | None) -> None:
        self._keep = keep
        self._measured: deque[Place] = deque()
        self._thread = ThreadPoolExecutor(1, "mui-fetch")

    def fetch(self, place: Place, following: Place | None) -> None:
        """Wait until a checkpoint is on this machine, and have the following one come meanwhile.

        Raises:
            Exception: it cannot be had.
        """
        self._thread.submit(place.fetch).result()
        if following is not None:
            self._thread.submit(attempt, following.fetch)  # what goes wrong is raised when it is its turn

    def let_go(self, place: Place) -> None:
        """A checkpoint is measured, or cannot be."""
        self._measured.append(place)
        while self._keep is not None and len(self._measured) > self._keep:
            self._thread.submit(_delete, self._measured.popleft())

    def __enter__(self) -> Fetching:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown(cancel_futures=error is not None)


def _delete(place: Place) -> None:
    _, error = attempt(place.let_go)
    if error is not None:
        warn(f"a downloaded checkpoint could not be deleted ({described(error)})")

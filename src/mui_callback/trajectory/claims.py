"""Who measures what, where several processes work on one study: a checkpoint is claimed by one of them at a time.

A claim is a lock of the file system, which ends with its process, however that ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from mui_callback.trajectory.checkpoint import CheckpointId

_LOCKS_NAME = "locks"


class Claims:
    """Those of one study.

    Args:
        directory: of the study.
    """

    def __init__(self, directory: Path) -> None:
        self._locks = directory / _LOCKS_NAME

    @contextmanager
    def claim(self, checkpoint: CheckpointId) -> Iterator[bool]:
        """Whether this process has it; False where another one does."""
        lock = self._lock(checkpoint.slug)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For what is written of the whole study: waits for the others."""
        with self._lock("study"):
            yield

    def _lock(self, name: str) -> FileLock:
        self._locks.mkdir(parents=True, exist_ok=True)
        return FileLock(self._locks / f"{name}.lock")

"""The processes of a distributed run, as far as they must agree about a probe.

They talk through the key-value store that `torch.distributed` was started with: it needs no device, cannot get in the
way of the collectives of the training, and whoever waits in vain is told so. One process alone talks to nobody.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import TypeVar

from torch import distributed

from mui_callback.errors import DesynchronizedError

_T = TypeVar("_T")

_WAIT = timedelta(minutes=10)
_SHOWN = 3
"""Failures that are told in words; of a thousand processes, all may fail alike."""
_numbers = count()


@dataclass(frozen=True)
class Failure:
    """What went wrong in one process."""

    rank: int
    text: str
    out_of_memory: bool

    def __str__(self) -> str:
        return f"process {self.rank}: {self.text}"


class Processes:
    """All processes of the run, for one purpose: each makes the same calls in the same order.

    Without `torch.distributed`, or with a backend that has no store, it is one process alone; the environment says
    which one.

    Args:
        wait: how long the others are waited for.
    """

    def __init__(self, wait: timedelta = _WAIT) -> None:
        is_running = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if is_running else int(os.environ.get("RANK", "0"))
        self.size = distributed.get_world_size() if is_running else 1
        self._wait = wait
        self._store = None
        if self.size > 1:
            store = distributed.distributed_c10d._get_default_store()
            self._store = distributed.distributed_c10d.PrefixStore(f"mui-callback/{next(_numbers)}", store)
        self._n_calls = 0

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and decides."""
        return self.rank == 0

    def from_main(self, decide: Callable[[], _T]) -> _T:
        """What the main process decides, in every process.

        Args:
            decide: called in the main process only; its result is what JSON can hold.

        Raises:
            DesynchronizedError: the main process did not come to this call.
        """
        if self._store is None:
            return decide()
        key = self._next_key()
        if self.is_main:
            self._store.set(key, json.dumps(decide()))
        else:
            self._wait_for(key)
        decided: _T = json.loads(self._store.get(key))
        return decided

    def failures(self, error: BaseException | None) -> list[Failure]:
        """The failures of all processes, the same in each; empty if all went well.

        Args:
            error: what went wrong in this process.

        Raises:
            DesynchronizedError: not all processes came to this call.
        """
        mine = None if error is None else Failure(self.rank, f"{type(error).__name__}: {error}", out_of_memory(error))
        if self._store is None:
            return [] if mine is None else [mine]
        key = self._next_key()
        if mine is not None:
            # Those that ran out of memory are numbered apart, so that one look tells whether all failures are such.
            kind = "memory" if mine.out_of_memory else "other"
            number = self._store.add(f"{key}/{kind}", 1)
            self._store.set(f"{key}/{kind}/{number}", json.dumps([mine.rank, mine.text]))
        if self._store.add(f"{key}/arrived", 1) == self.size:
            self._store.set(f"{key}/all", "")
        self._wait_for(f"{key}/all")
        found = []
        for kind in ("other", "memory"):
            for number in range(1, min(self._store.add(f"{key}/{kind}", 0), _SHOWN) + 1):
                self._wait_for(f"{key}/{kind}/{number}")
                rank, text = json.loads(self._store.get(f"{key}/{kind}/{number}"))
                found.append(Failure(rank, text, kind == "memory"))
        return found

    def _next_key(self) -> str:
        self._n_calls += 1
        return str(self._n_calls)

    def _wait_for(self, key: str) -> None:
        assert self._store is not None
        try:
            self._store.wait([key], self._wait)
        except (RuntimeError, OSError) as error:  # DistStoreError is a RuntimeError
            raise DesynchronizedError(
                f"process {self.rank} of {self.size} waited in vain for the others "
                f"({self._wait.total_seconds():g} s). Every process of the run has to make the callback or the "
                "monitor, and to report the same steps to it."
            ) from error


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a smaller batch could do better."""
    words = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )

"""The processes of a distributed run, as far as they must agree about a probe.

They talk through the key-value store that `torch.distributed` was started with: it needs no device, cannot get in the
way of the collectives of the training, and whoever waits in vain is told so. One process alone talks to nobody.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any, Literal, TypeVar, cast, get_args

from torch import distributed

from mui_callback.errors import DesynchronizedError, ProbeError
from mui_callback.forgiving import attempt, described

_T = TypeVar("_T")

_WAIT = timedelta(minutes=5)
"""Half of what NCCL waits before it ends the training."""
_SHOWN = 3
"""Failures that are told in words; of a thousand processes, all may fail alike."""
_ABANDONED = "abandoned"
_numbers = count()


Kind = Literal["other", "reading", "memory"]
"""``"reading"``: a `ProbeError`, which is about how the layers are read."""


@dataclass(frozen=True)
class Failure:
    """What went wrong in one process."""

    rank: int
    text: str
    kind: Kind

    @property
    def out_of_memory(self) -> bool:
        """Whether a smaller batch may go well."""
        return self.kind == "memory"

    def __str__(self) -> str:
        return f"process {self.rank}: {self.text}"


class Processes:
    """All processes of the run, for one purpose: each makes the same calls in the same order.

    Without `torch.distributed`, or with a backend that has no store, a process is alone.

    Args:
        wait: how long the others are waited for.
    """

    def __init__(self, wait: timedelta = _WAIT) -> None:
        is_running = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if is_running else 0
        self.world_size = distributed.get_world_size() if is_running else 1
        self._wait = wait
        self._store: Any = None
        store = distributed.distributed_c10d._get_default_store() if self.world_size > 1 else None
        if store is not None:
            self._store = distributed.distributed_c10d.PrefixStore(f"mui-callback/{next(_numbers)}", store)
        self._n_calls = 0

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and decides."""
        return self.rank == 0

    def from_main(self, decide: Callable[[], _T]) -> _T:
        """What the main process decides, in every process.

        Args:
            decide: called in the main process only; its result can be pickled.

        Raises:
            DesynchronizedError: the main process did not come to this call.
            ProbeError: its decision failed; in the main process, whatever it failed with.
        """
        if self._store is None:
            return decide()
        with self._talking() as key:
            if not self.is_main:
                self._wait_for(key)
                told: dict[str, Any] = pickle.loads(self._store.get(key))
        if self.is_main:
            told = self._decide(decide, key)
        if "failed" in told:
            raise ProbeError(f"process 0: {told['failed']}")
        decided: _T = told["decided"]
        return decided

    def gather_failures(self, error: BaseException | None) -> list[Failure]:
        """The failures of all processes, the same in each; empty if all went well.

        Args:
            error: what went wrong in this process.

        Raises:
            DesynchronizedError: not all processes came to this call.
        """
        mine = None if error is None else Failure(self.rank, described(error), _kind(error))
        if self._store is None:
            return [] if mine is None else [mine]
        with self._talking() as key:
            if mine is not None:
                # Each kind is numbered apart, so that one look tells whether all failures are of one.
                number = self._store.add(f"{key}/{mine.kind}", 1)
                self._store.set(f"{key}/{mine.kind}/{number}", json.dumps([mine.rank, mine.text]))
            if self._store.add(f"{key}/arrived", 1) == self.world_size:
                self._store.set(f"{key}/all", "")
            self._wait_for(f"{key}/all")
            found = []
            for kind in get_args(Kind):
                for number in range(1, min(self._store.add(f"{key}/{kind}", 0), _SHOWN) + 1):
                    rank, text = json.loads(self._store.get(f"{key}/{kind}/{number}"))
                    found.append(Failure(rank, text, kind))
            return found

    def together(self, action: Callable[[], _T]) -> _T:
        """Do something that raises in every process if it does in one.

        Raises:
            ProbeError: it raised in another process only; otherwise whatever it raised in this one.
        """
        result, error = attempt(action)
        self.raise_everywhere(error)
        return cast(_T, result)

    def raise_everywhere(self, error: Exception | None) -> None:
        """Raise if any process has an error: its own, or a `ProbeError` that names those of the others."""
        if failures := self.gather_failures(error):
            raise error or ProbeError(in_words(failures))

    def _decide(self, decide: Callable[[], _T], key: str) -> dict[str, Any]:
        try:
            told = {"decided": decide()}
            message = pickle.dumps(told)
        except BaseException as error:
            with self._translated():
                self._store.set(key, pickle.dumps({"failed": described(error)}))
            raise
        with self._translated():
            self._store.set(key, message)
        return told

    @contextmanager
    def _talking(self) -> Iterator[str]:
        """The key of this exchange; whoever gives one up gives up all, so that nobody waits for it again."""
        self._n_calls += 1
        with self._translated():
            if self._store.check([_ABANDONED]):
                raise DesynchronizedError(f"process {self.rank} of {self.world_size}: another process gave up.")
            yield str(self._n_calls)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """What a store raises, as an error that says what to do."""
        try:
            yield
        except (RuntimeError, OSError) as error:  # the errors of torch's stores are RuntimeErrors
            if isinstance(error, DesynchronizedError):
                raise
            raise DesynchronizedError(
                f"process {self.rank} of {self.world_size} cannot reach the others ({type(error).__name__}: {error})."
            ) from error

    def _wait_for(self, key: str) -> None:
        try:
            self._store.wait([key], self._wait)
        except (RuntimeError, OSError) as error:
            self._store.set(_ABANDONED, "")
            raise DesynchronizedError(
                f"process {self.rank} of {self.world_size} waited in vain for the others "
                f"({self._wait.total_seconds():g} s). Every process of the run has to make the callback or the "
                "monitor, and to report the same steps to it."
            ) from error


def in_words(failures: Sequence[Failure]) -> str:
    """All of them, in one line."""
    return "; ".join(map(str, failures))


def _kind(error: BaseException) -> Kind:
    if out_of_memory(error):
        return "memory"
    return "reading" if isinstance(error, ProbeError) else "other"


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a smaller batch could do better."""
    words = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )

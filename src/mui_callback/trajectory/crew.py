"""The processes that ``torchrun`` or ``accelerate launch`` started for a study, and what each of them does."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from mui_callback.errors import MUIError
from mui_callback.trajectory.config import Distribute

_T = TypeVar("_T")
_numbers = count()
_A_STUDY = timedelta(days=30)
"""How long processes that have done their part wait for the others."""


@dataclass(frozen=True)
class Crew:
    """This process and the others; a process alone is a crew, too."""

    distribute: Distribute = "checkpoints"
    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls, distribute: Distribute) -> Crew:
        """As the launcher says in ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``.

        Raises:
            MUIError: weights are to be divided, and there is one process.
        """
        rank, size, local_rank = (
            int(os.environ.get(name, d)) for name, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        if size == 1 and distribute == "weights":
            raise MUIError(
                "distribute: expected several processes to divide weights among, as torchrun starts them, got 1"
            )
        return cls(distribute, rank, size, local_rank)

    @property
    def is_main(self) -> bool:
        """Whether this process says what goes on."""
        return self.rank == 0

    @property
    def works_together(self) -> bool:
        """Whether all processes measure the same checkpoint at a time."""
        return self.size > 1 and self.distribute != "checkpoints"

    def device(self, name: str) -> str:
        """The device of this process.

        Args:
            name: as in the config; with several processes ``cuda`` stands for one GPU each.

        Raises:
            MUIError: there is no such device, or none for this process.
        """
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        kind, _, number = name.partition(":")
        n_there = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(kind, 0)
        if not n_there or not (number or "0").isdigit() or int(number or 0) >= n_there:
            raise MUIError(f"device: expected cpu, cuda, cuda:1 or auto, and that it is there, got {name!r}")
        if name != "cuda" or self.size == 1:
            return name
        if self.local_rank >= torch.cuda.device_count():
            raise MUIError(f"device: expected a GPU for each process, got {torch.cuda.device_count()} on this machine")
        return f"cuda:{self.local_rank}"

    @contextmanager
    def assembled(self, device: str) -> Iterator[None]:
        """Processes that work together talk to each other, through a process group that may be there already.

        Raises:
            MUIError: there is a process group, and each process is to work by itself.
        """
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        was_there = distributed.is_initialized()
        if was_there and not self.works_together and self.size > 1:
            raise MUIError("distribute: checkpoints: expected processes that work by themselves, got a process group")
        if self.works_together and not was_there:
            distributed.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
        if self.size > 1 and not self.works_together:
            _launcher_store()  # whoever cannot be reached is not found so at the end
        try:
            yield
        finally:
            if distributed.is_initialized() and not was_there:
                distributed.destroy_process_group()

    def in_turn(self, checkpoints: Sequence[_T]) -> list[_T]:
        """The checkpoints in the order in which this process looks at them: each begins elsewhere."""
        start = 0 if self.works_together else self.rank * len(checkpoints) // self.size
        return [*checkpoints[start:], *checkpoints[:start]]

    def gather(self, own: _T) -> list[_T]:
        """What each process has in the end, in all of them; waits for the last one."""
        if self.size == 1:
            return [own]
        parts: list[Any] = [None] * self.size
        if self.works_together:
            distributed.all_gather_object(parts, own)
            return parts
        store: Any = PrefixStore(f"mui-study/{next(_numbers)}", _launcher_store())
        store.set(f"part/{self.rank}", pickle.dumps(own))
        store.wait([f"part/{rank}" for rank in range(self.size)], _A_STUDY)
        parts = [pickle.loads(store.get(f"part/{rank}")) for rank in range(self.size)]
        store.set(f"seen/{self.rank}", "")
        if self.is_main:  # the store may end with it
            store.wait([f"seen/{rank}" for rank in range(self.size)], _A_STUDY)
        return parts


@cache
def _launcher_store() -> Any:
    """What the launcher has for its processes to find each other, without a process group."""
    store, _, _ = next(rendezvous("env://", timeout=_A_STUDY))
    return store

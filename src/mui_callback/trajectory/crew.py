"""The processes that ``torchrun`` or ``accelerate launch`` started for a study, and what each of them does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from mui_callback.errors import MUIError
from mui_callback.trajectory.config import Distribute

_T = TypeVar("_T")
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
            MUIError: there is none for this process.
        """
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name != "cuda" or self.size == 1:
            return name
        if self.local_rank >= torch.cuda.device_count():
            raise MUIError(f"device: expected a GPU for each process, got {torch.cuda.device_count()} on this machine")
        return f"cuda:{self.local_rank}"

    def assemble(self, device: str) -> None:
        """Let processes that work together talk to each other."""
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        if self.works_together and not distributed.is_initialized():
            distributed.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")

    def in_turn(self, checkpoints: Sequence[_T]) -> list[_T]:
        """The checkpoints in the order in which this process looks at them: each begins elsewhere."""
        start = 0 if self.works_together else self.rank * len(checkpoints) // self.size
        return [*checkpoints[start:], *checkpoints[:start]]

    def gather(self, own: _T) -> list[_T]:
        """What each process has in the end, in all of them; waits for the last one."""
        if self.size == 1:
            return [own]
        if not distributed.is_initialized():
            distributed.init_process_group("gloo", timeout=_A_STUDY)
        parts: list[_T | None] = [None] * self.size
        distributed.all_gather_object(parts, own)
        return [part for part in parts if part is not None]

    def dismiss(self) -> None:
        """The processes need each other no more."""
        if self.size > 1 and distributed.is_initialized():
            distributed.destroy_process_group()

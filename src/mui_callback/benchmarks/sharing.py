"""How the processes of a distributed run work on one benchmark: each a part of it, and all fail together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
from torch import distributed

from mui_callback.errors import DesynchronizedError, InterruptedPassError, ProbeError
from mui_callback.forgiving import attempt, described
from mui_callback.parallel.processes import Failure, Processes, in_words
from mui_callback.parallel.shards import Shards

_T = TypeVar("_T")


class TogetherError(ProbeError):
    """Something failed in one process or in several, and all of them know."""

    def __init__(self, failures: Sequence[Failure]) -> None:
        super().__init__(in_words(failures))
        self.failures = failures


@dataclass(frozen=True)
class Sharing:
    """The processes, and who does what. A process alone does everything and waits for nobody.

    Whatever may fail is done inside of `together`, and collectives come only right after it. So one that fails meets
    the others wherever they are, and nobody is left waiting in a collective.
    """

    processes: Processes = field(default_factory=Processes)
    shards: Shards = field(default_factory=Shards)

    @property
    def is_main(self) -> bool:
        """Whether what this process gives counts."""
        return self.processes.is_main

    @property
    def deals_out(self) -> bool:
        """Whether every process can do a part of its own: there are several, and each has the whole model to itself."""
        return not (self.shards.in_step or self.shards.world.is_alone)

    def together(self, action: Callable[[], _T], *, with_less_memory: Callable[[], bool] | None = None) -> _T:
        """Do something in all processes; it fails in all if it does in one.

        Args:
            action: what each does.
            with_less_memory: called in every process where all that failed ran out of memory; says whether it is worth
                another try.

        Raises:
            TogetherError: it failed in one of them.
            DesynchronizedError: not all processes came to this call.
            InterruptedPassError: the same, after it failed in this process, where processes exchange tensors in the
                forward pass: the others may wait for this one in vain, so that nothing can go on.
        """
        while True:
            result, error = attempt(action)
            failures = self.gather(error)
            if not failures:
                return cast(_T, result)
            is_memory = all(failure.out_of_memory for failure in failures)
            if not (is_memory and with_less_memory is not None and with_less_memory()):
                raise TogetherError(failures) from error
            del error  # its traceback holds the tensors of the pass
            torch.cuda.empty_cache()

    def gather(self, error: Exception | None) -> Sequence[Failure]:
        """The failures of all processes; those that all know already are not told again.

        Raises:
            DesynchronizedError: see `together`.
            InterruptedPassError: …
        """
        if isinstance(error, InterruptedPassError | DesynchronizedError):
            raise error
        if isinstance(error, TogetherError):
            return error.failures
        try:
            return self.processes.gather_failures(error)
        except DesynchronizedError as lost:
            if error is None or not self.shards.in_step:
                raise
            raise InterruptedPassError(
                f"process {self.processes.rank} of {self.processes.world_size} failed in a benchmark "
                f"({described(error)}), and the others did not come. With weights or experts spread over processes "
                f"they may wait for it in a forward pass, so that nothing can go on. {lost}"
            ) from error

    def all_gather(self, part: _T) -> list[_T]:
        """The parts of all processes, in the order of their shards; only where the work is dealt out."""
        parts: list[_T | None] = [None] * self.shards.world.n
        distributed.all_gather_object(parts, part, group=self.shards.world.group)
        return cast("list[_T]", parts)

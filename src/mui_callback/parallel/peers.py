"""The few collectives of a probe, counted; none of them does anything where a process is alone.

Shapes: P processes of a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Traffic:
    """Bytes that this process sent to others."""

    sent: int = 0


class Peers:
    """The processes of a group, in the order of their rank in it.

    Every process of the group makes the same calls in the same order.

    Args:
        group: a process group; None for this process alone.
        traffic: where bytes are counted.
    """

    def __init__(self, group: Any = None, traffic: Traffic | None = None) -> None:
        self.group = group
        self.traffic = traffic or Traffic()
        self.ranks: tuple[int, ...] = tuple(distributed.get_process_group_ranks(group)) if group is not None else (0,)
        """Ranks in the world; ``(0,)`` for a process alone."""
        self.index = distributed.get_rank(group) if group is not None else 0
        """Place of this process among them."""

    @property
    def n(self) -> int:
        """P."""
        return len(self.ranks)

    @property
    def is_alone(self) -> bool:
        """Whether there is nobody else."""
        return self.n == 1

    def add(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all processes."""
        self._reduce(tensor, distributed.ReduceOp.SUM)

    def highest(self, tensor: Tensor) -> None:
        """Replace a tensor by its maximum over all processes."""
        self._reduce(tensor, distributed.ReduceOp.MAX)

    def exchange(self, outgoing: Tensor, n_out: Sequence[int], n_in: Sequence[int]) -> Tensor:
        """Send rows to each process and receive rows from each.

        Args:
            outgoing: ``[Σ n_out, …]``, those for the first process first.
            n_out: rows for each process.
            n_in: rows from each process.

        Returns:
            ``[Σ n_in, …]``, those of the first process first.
        """
        if self.is_alone:
            return outgoing
        incoming = outgoing.new_empty(sum(n_in), *outgoing.shape[1:])
        distributed.all_to_all_single(incoming, outgoing.contiguous(), list(n_in), list(n_out), group=self.group)
        to_others = sum(n_out) - n_out[self.index]
        self.traffic.sent += to_others * outgoing[:1].numel() * outgoing.element_size() if to_others else 0
        return incoming

    def gather(self, own: Tensor) -> Tensor:
        """Put together what all processes have, ``[n]`` of a size that may differ, in their order: ``[Σ n]``."""
        if self.is_alone:
            return own
        size = torch.tensor([len(own)], dtype=torch.int64, device=own.device)
        sizes = torch.empty(self.n, dtype=torch.int64, device=own.device)
        _all_gather(sizes, size, group=self.group)
        n_of = sizes.tolist()
        largest = max(n_of)
        padded = torch.nn.functional.pad(own, (0, largest - len(own)))
        whole = padded.new_empty(self.n * largest)
        _all_gather(whole, padded, group=self.group)
        self.traffic.sent += (self.n - 1) * (size.nbytes + padded.nbytes)
        return torch.cat([part[:n] for part, n in zip(whole.view(self.n, largest), n_of, strict=True)])

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Whatever is exchanged in here, by anybody's operators, is counted."""
        if self.is_alone:
            yield
            return
        with _Counter(self):
            yield

    def _reduce(self, tensor: Tensor, operation: Any) -> None:
        if not self.is_alone:
            distributed.all_reduce(tensor, operation, group=self.group)
            # as in a ring: each part goes around once to be reduced and once to be told
            self.traffic.sent += 2 * (self.n - 1) * tensor.numel() * tensor.element_size() // self.n


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, peers: Peers) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peers = peers

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            self.peers.traffic.sent += self._to_others(args)
        return func(*args, **(kwargs or {}))

    def _to_others(self, args: Any) -> int:
        largest = max((part.nbytes for part in tree_leaves(args) if isinstance(part, Tensor)), default=0)
        splits = [part for part in args if isinstance(part, list) and len(part) == self.peers.n]
        own = splits[-1][self.peers.index] if splits else 1  # those of the input come last; without any, all are equal
        total = sum(splits[-1]) if splits else self.peers.n
        return largest * (total - own) // total if total else 0


# another name since torch 2.13
_all_gather: Any = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor

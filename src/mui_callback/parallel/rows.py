"""Rows of a matrix that is spread over processes, for each process those that it asks for.

Every process knows what all of them ask for, so nothing but rows is sent, and never the whole matrix.

Shapes: V rows, D columns, U different rows that a process asks for, R rows that it asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mui_callback.errors import UnsupportedModelError
from mui_callback.parallel.peers import Peers, Traffic
from mui_callback.parallel.weights import is_apart, is_dtensor, is_zero3, whole_shape

Rows = NDArray[np.int64]


def rows_of(weight: Tensor, wanted: Sequence[Rows], rank: int, device: torch.device, traffic: Traffic) -> Tensor:
    """Rows of a matrix, whether it is spread over processes at present or not.

    Args:
        weight: ``[V, D]``.
        wanted: by rank in the world, the rows that each process asks for, int64 ``[R]``.
        rank: that of this process.
        device: where they are wanted.
        traffic: counts the bytes that are sent.

    Returns:
        ``[R, D]`` in the dtype of the matrix.

    Raises:
        UnsupportedModelError: the matrix is spread in a way that is not known.
    """
    if not is_apart(weight):
        return weight.detach()[torch.from_numpy(wanted[rank]).to(weight.device, non_blocking=True)]
    spread = _Spread.of(weight, device, traffic)
    return spread.rows([wanted[other] for other in spread.peers.ranks], wanted[rank])


def check_rows(weight: Tensor) -> None:
    """Make sure that rows of a matrix can be read when it is spread over processes.

    Raises:
        UnsupportedModelError: it is, or will be, in a way that is not known.
    """
    if is_apart(weight):
        _group(weight)


@dataclass(frozen=True)
class _Spread:
    """A matrix whose elements, row by row, are dealt out to processes one stretch after the other."""

    local: Tensor
    """The elements of this process, in one dimension."""
    starts: tuple[int, ...]
    """The first element of each process; one more for the end."""
    width: int
    """D."""
    peers: Peers

    @classmethod
    def of(cls, weight: Any, device: torch.device, traffic: Traffic) -> _Spread:
        n_rows, width = whole_shape(weight)
        peers = Peers(_group(weight), traffic)
        if is_zero3(weight):
            size = int(weight.ds_tensor.ds_numel)
            local = weight.ds_tensor.data
            if local.numel() < size:
                raise UnsupportedModelError("the language-model head is not in memory; is it offloaded to a disk?")
        else:
            size = -(-n_rows // peers.n) * width  # as torch.chunk deals out rows
            local = weight.to_local().detach()
        ends = [min(size * index, n_rows * width) for index in range(peers.n + 1)]
        return cls(local.to(device).flatten(), tuple(ends), width, peers)

    def rows(self, wanted: Sequence[Rows], own: Rows) -> Tensor:
        """See `rows_of`; `wanted` is by place in the group."""
        different = [np.unique(rows) for rows in wanted]
        here = self.peers.index
        outgoing = [self._held_by(here, rows) for rows in different]
        incoming = [self._held_by(other, different[here]) for other in range(self.peers.n)]
        pieces = self.peers.exchange(
            torch.cat([self._pieces(rows) for rows in outgoing]), list(map(len, outgoing)), list(map(len, incoming))
        )
        place = np.searchsorted(different[here], np.concatenate(incoming))
        rows_UD = self.local.new_zeros(len(different[here]), self.width)
        rows_UD.index_add_(0, self._index(place), pieces)  # a row that is divided comes in pieces, zero elsewhere
        return rows_UD[self._index(np.searchsorted(different[here], own))]

    def _held_by(self, index: int, rows: Rows) -> Rows:
        """Those rows of which a process has a part."""
        start, end = self.starts[index : index + 2]
        return rows[(rows * self.width < end) & ((rows + 1) * self.width > start)]

    def _pieces(self, rows: Rows) -> Tensor:
        """What this process has of each row, ``[len(rows), D]``; zero where it has nothing."""
        start, end = self.starts[self.peers.index : self.peers.index + 2]
        element = self._index(rows * self.width)[:, None] + torch.arange(self.width, device=self.local.device) - start
        is_here = (element >= 0) & (element < end - start)
        if not len(rows):
            return self.local.new_zeros(0, self.width)
        return self.local[element.clamp(0, end - start - 1)].where(is_here, 0)

    def _index(self, rows: Rows) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(rows)).to(self.local.device)


def _group(weight: Any) -> Any:
    if is_zero3(weight):
        return weight.ds_process_group
    assert is_dtensor(weight)
    mesh, placements = weight.device_mesh, weight.placements
    dealt = [dimension for dimension, placement in enumerate(placements) if not placement.is_replicate()]
    if len(dealt) != 1 or not placements[dealt[0]].is_shard(0):
        raise UnsupportedModelError(
            f"expected a language-model head whose rows are dealt out to processes, got placements {placements}"
        )
    return mesh.get_group(dealt[0])

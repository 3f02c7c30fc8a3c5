"""One forward pass of all processes: which tokens meet where."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from mui_callback.experts.layer import ExpertLayer
from mui_callback.parallel.peers import Peers
from mui_callback.parallel.shards import Shards
from mui_callback.probe.batches import Batch
from mui_callback.probe.device_batch import DeviceBatch, to_device
from mui_callback.scoring.contributions import Responses, ScoredTokens
from mui_callback.scoring.meeting import Meeting


@dataclass(frozen=True)
class Round:
    """A batch of this process on its device, and those of the processes that it shares experts with.

    Every process knows the batches of all, so that nothing has to be asked.
    """

    inputs: DeviceBatch
    meetings: tuple[Meeting | None, ...]
    """By layer, whose tokens meet there; None for a layer whose experts are all in this process."""
    firsts: tuple[int, ...]
    """By layer, the number of this process' first token there."""

    @classmethod
    def of(
        cls, batches: tuple[Batch, ...], shards: Shards, layers: tuple[ExpertLayer, ...], device: torch.device
    ) -> Round:
        """Of the batches of all shards."""
        known: dict[tuple[int, ...], tuple[Meeting | None, int]] = {}
        for layer in layers:
            if layer.peers.ranks not in known:
                known[layer.peers.ranks] = _meeting(layer.peers, batches, shards, device)
        meetings, firsts = zip(*(known[layer.peers.ranks] for layer in layers), strict=True)
        return cls(to_device(batches[shards.own], device), meetings, firsts)

    def tokens(self, index: int) -> ScoredTokens:
        """The scored tokens of this process, numbered as they meet in a layer."""
        meeting = self.meetings[index]
        if meeting is None:
            return self.inputs.tokens
        return replace(self.inputs.tokens, first=self.firsts[index], n_met=len(meeting.responses.row_R))


def _meeting(
    peers: Peers, batches: tuple[Batch, ...], shards: Shards, device: torch.device
) -> tuple[Meeting | None, int]:
    if peers.is_alone:
        return None, 0
    met = list(dict.fromkeys(shards.shard_of[rank] for rank in peers.ranks))
    n_rows = [len(batches[shard].sample) for shard in met]
    first_rows = np.cumsum([0, *n_rows[:-1]])
    rows = [batches[shard].row + first for shard, first in zip(met, first_rows, strict=True)]
    samples = np.concatenate([batches[shard].sample for shard in met])

    def move(array: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> torch.Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    meeting = Meeting(
        peers,
        Responses(
            row_R=move(np.concatenate(rows)),
            order_R=move(np.concatenate([batches[shard].order for shard in met])),
            n_rows=len(samples),
            n_orders=max(batches[shard].n_scored_max for shard in met),
        ),
        sample_B=move(samples),
        n_of_peer=tuple(
            len(batches[shards.shard_of[rank]].sample) if shards.shard_of.index(shards.shard_of[rank]) == rank else 0
            for rank in peers.ranks
        ),
    )
    return meeting, sum(len(batches[shard].target) for shard in met[: met.index(shards.own)])

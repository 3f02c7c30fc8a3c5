"""One forward pass of all processes: which tokens meet where."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mui_callback.experts.layer import ExpertLayer
from mui_callback.parallel.peers import Peers
from mui_callback.parallel.shards import Shards
from mui_callback.probe.batches import Batch
from mui_callback.probe.device_batch import DeviceBatch, to_device
from mui_callback.probe.head import LanguageModelHead
from mui_callback.scoring.contributions import Responses, ScoredTokens
from mui_callback.scoring.meeting import Meeting
from mui_callback.settings import Alignment


@dataclass(frozen=True)
class Round:
    """A batch of this process on its device, and those of the processes that it shares experts with.

    Every process knows the batches of all, so that nothing has to be asked.
    """

    inputs: DeviceBatch
    scored: ScoredTokens
    """Its scored tokens, and the positions whose activations are scored against them."""
    meetings: tuple[Meeting | None, ...]
    """By layer, whose tokens meet there; None for a layer whose experts are all in this process."""
    firsts: tuple[int, ...]
    """By layer, the number of this process' first token there."""
    readout_RD: Tensor
    """Unembedding row of the target of each scored token of this process."""

    @classmethod
    def of(
        cls,
        batches: tuple[Batch, ...],
        shards: Shards,
        layers: tuple[ExpertLayer, ...],
        head: LanguageModelHead,
        device: torch.device,
        alignment: Alignment,
    ) -> Round:
        """Of the batches of all shards."""
        known: dict[tuple[int, ...], tuple[Meeting | None, int]] = {}
        for layer in layers:
            if layer.peers.ranks not in known:
                known[layer.peers.ranks] = _meeting(layer.peers, batches, shards, device)
        meetings, firsts = zip(*(known[layer.peers.ranks] for layer in layers), strict=True)
        readout_RD = head.rows([batch.target for batch in batches], shards, device)
        inputs = to_device(batches[shards.own], device)
        shift = 1 if alignment == "same" else 0
        scored = replace(inputs.tokens, position_R=inputs.tokens.position_R + shift)
        return cls(inputs, scored, meetings, firsts, readout_RD)

    def tokens(self, index: int) -> ScoredTokens:
        """The scored tokens of this process, numbered as they meet in a layer."""
        return self._met[index][0]

    def readout(self, index: int) -> Tensor:
        """Unembedding row of the target of each token that meets in a layer, ``[R, D]``."""
        return self._met[index][1]

    @cached_property
    def _met(self) -> list[tuple[ScoredTokens, Tensor]]:
        known: dict[int, tuple[ScoredTokens, Tensor]] = {id(None): (self.scored, self.readout_RD)}
        for meeting, first in zip(self.meetings, self.firsts, strict=True):
            if meeting is not None and id(meeting) not in known:
                tokens = replace(self.scored, first=first, n_met=len(meeting.responses.row_R))
                known[id(meeting)] = tokens, meeting.gather_rows(self.readout_RD)
        return [known[id(meeting)] for meeting in self.meetings]


def _meeting(
    peers: Peers, batches: tuple[Batch, ...], shards: Shards, device: torch.device
) -> tuple[Meeting | None, int]:
    if peers.is_alone:
        return None, 0
    met = list(dict.fromkeys(shards.shard_of[rank] for rank in peers.ranks))
    owners = [(shards.shard_of[rank], shards.shard_of.index(shards.shard_of[rank]) == rank) for rank in peers.ranks]
    n_rows = [len(batches[shard].sample) for shard in met]
    first_rows = np.cumsum([0, *n_rows[:-1]])
    rows = [batches[shard].row + first for shard, first in zip(met, first_rows, strict=True)]
    samples = np.concatenate([batches[shard].sample for shard in met])

    def move(array: NDArray[np.int64]) -> Tensor:
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
        n_of_peer=tuple(len(batches[shard].sample) if is_first else 0 for shard, is_first in owners),
        n_tokens_of_peer=tuple(len(batches[shard].target) if is_first else 0 for shard, is_first in owners),
    )
    return meeting, sum(len(batches[shard].target) for shard in met[: met.index(shards.own)])

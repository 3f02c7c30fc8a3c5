"""Where tokens of several processes meet, because the experts of a layer are spread over these processes.

Each process has scores of its own experts for the tokens of all. The key neurons of a sample are those of the highest
scores over all of them; so everyone sends each sample's best candidates to the process that has the sample, and the
best of these are the best of all.

Shapes: B samples that meet, k candidates of a sample in a layer, P processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mui_callback.parallel.peers import Peers
from mui_callback.scoring.contributions import Responses
from mui_callback.scoring.topk import Candidates


@dataclass(frozen=True)
class Meeting:
    """The tokens of a round that meet in a layer, in the order of who has them."""

    peers: Peers
    responses: Responses
    """The scored tokens that meet."""
    sample_B: Tensor
    """Number of each sample, int64 ``[B]``."""
    n_of_peer: tuple[int, ...]
    """How many of the samples each process finds the key neurons of; those of the first process come first."""
    n_tokens_of_peer: tuple[int, ...]
    """How many of the tokens are of these."""

    def gather_rows(self, own_RD: Tensor) -> Tensor:
        """What all of the processes have of each of their tokens, ``[R, D]``, from what this one has."""
        n_own = self.n_tokens_of_peer[self.peers.index]
        outgoing = own_RD[:n_own].repeat(self.peers.n, 1)
        return self.peers.exchange(outgoing, [n_own] * self.peers.n, self.n_tokens_of_peer)

    def exchange(self, found: Sequence[Candidates]) -> list[list[Candidates]]:
        """Send each sample's candidates to the process that has it.

        Args:
            found: candidates of the B samples among the experts of this process, for each layer.

        Returns:
            For each layer, the candidates that each process found of this one's samples; empty if it has none.
        """
        sizes = [candidates.score.shape[1] for candidates in found]
        n_own = self.n_of_peer[self.peers.index]
        n_in = [n_own] * self.peers.n
        score = self.peers.exchange(torch.cat([c.score for c in found], dim=1), self.n_of_peer, n_in)
        place = self.peers.exchange(torch.cat([c.place for c in found], dim=1), self.n_of_peer, n_in)
        if n_own == 0:
            return []
        scores = [torch.split(part, n_own) for part in torch.split(score, sizes, dim=1)]
        places = [torch.split(part, n_own) for part in torch.split(place, sizes, dim=1)]
        return [
            [Candidates(*part) for part in zip(*of_layer, strict=True)] for of_layer in zip(scores, places, strict=True)
        ]

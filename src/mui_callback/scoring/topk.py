"""Exact, deterministic selection of a sample's highest contributions.

Equal scores are ordered by their place (position, expert, neuron), so the result does not depend on the batch
that a sample came in, on how its rows were cut into pieces, or on the device's own top-k.

Shapes: B samples, M scores, c neurons of a chunk, k entries that are kept, or chunks that hold them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mui_callback.fused import scores
from mui_callback.scoring.rows import CHUNK, NOTHING


@dataclass(frozen=True)
class Candidates:
    """The k best entries of each sample.

    ``score`` is float32 ``[B, k]``, descending, minus infinity where a sample has fewer than k finite entries;
    ``place`` is int64 ``[B, k]``: the number that orders equal scores and says which neuron the entry is.
    """

    score: Tensor
    place: Tensor

    @classmethod
    def none(cls, n_samples: int, k: int, device: torch.device) -> Candidates:
        """No entries."""
        score = torch.full((n_samples, k), NOTHING, dtype=torch.float32, device=device)
        return cls(score, torch.zeros_like(score, dtype=torch.int64))

    def first(self, k: int) -> Candidates:
        """The k best of these."""
        return Candidates(self.score[:, :k], self.place[:, :k])


def ordered_topk(score_BM: Tensor, k: int) -> Tensor:
    """Indices, int64 ``[B, min(k, M)]``, of the k highest float32 scores; the lower index wins a tie.

    `torch.topk` leaves ties open, so the scores are ranked together with their index as one integer: the bits of
    the float in an order-preserving form above, the complement of the index below.
    """
    n_scores = score_BM.shape[1]
    if scores.can_order(score_BM):
        return 0xFFFFFFFF - (scores.order_keys(score_BM).topk(min(k, n_scores), dim=1).values & 0xFFFFFFFF)
    bits = (score_BM.float() + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    index = torch.arange(n_scores, device=score_BM.device)
    key = (ascending << 32) | (0xFFFFFFFF - index)
    best = key.topk(min(k, n_scores), dim=1).values
    return 0xFFFFFFFF - (best & 0xFFFFFFFF)


@dataclass(frozen=True)
class Finalists:
    """Chunks of neurons of each sample that hold its highest entries, in any order."""

    score_Bkc: Tensor
    """float32; `NOTHING` for what does not count."""
    place_Bk: Tensor
    """Place of the first entry of each chunk; see `Candidates`, int64. The others follow it."""

    @classmethod
    def joined(cls, parts: Sequence[Finalists]) -> Finalists:
        """Those of several layers with equally many, as if their samples were others."""
        return cls(torch.cat([part.score_Bkc for part in parts]), torch.cat([part.place_Bk for part in parts]))

    def entries(self, k: int) -> Candidates:
        """The k highest entries of all chunks."""
        place_Bk, order_Bk = self.place_Bk.sort(dim=1, stable=True)
        score_Bkc = self.score_Bkc.gather(1, order_Bk[..., None].expand_as(self.score_Bkc))
        best_Bk = ordered_topk(score_Bkc.flatten(1), k)
        score_Bk = score_Bkc.flatten(1).gather(1, best_Bk)
        place_Bk = place_Bk.gather(1, best_Bk // CHUNK) + best_Bk % CHUNK
        missing = k - best_Bk.shape[1]
        return Candidates(
            torch.nn.functional.pad(score_Bk, (0, missing), value=NOTHING),
            torch.nn.functional.pad(place_Bk, (0, missing)),
        )


def merge_candidates(parts: list[Candidates], k: int) -> Candidates:
    """The k highest of all parts' entries: pieces of a batch, kinds of experts or ranks give what the whole gives."""
    if len(parts) == 1 and parts[0].score.shape[1] == k:
        return parts[0]
    score = torch.cat([part.score for part in parts], dim=1)
    place = torch.cat([part.place for part in parts], dim=1)
    by_place = place.argsort(dim=1, stable=True)
    score, place = score.gather(1, by_place), place.gather(1, by_place)
    by_score = score.argsort(dim=1, descending=True, stable=True)[:, :k]
    return Candidates(score.gather(1, by_score), place.gather(1, by_score))

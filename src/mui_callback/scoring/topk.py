"""Exact, deterministic selection of a sample's highest contributions.

Equal scores are ordered by their place (position, expert, neuron), so the result does not depend on the batch
that a sample came in, on how its rows were cut into pieces, or on the device's own top-k.

Shapes: B samples, S rows of contributions (one token in one expert), P slots for the rows of a sample, K rows of a
sample that are looked at, C chunks of a row, c neurons of a chunk, k entries that are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mui_callback.scoring import kernels
from mui_callback.scoring.rows import CHUNK, NOTHING


class Chunks(Protocol):
    """Rows of contributions that can be had in chunks; see `Contributions`."""

    @property
    def n_rows(self) -> int:
        """S."""

    @property
    def n_chunks(self) -> int:
        """C."""

    def of_chunks(self, row_M: Tensor, chunk_M: Tensor) -> Tensor:
        """The contributions of some chunks, float32 ``[M, c]``."""


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
    if kernels.can_order(score_BM):
        return 0xFFFFFFFF - (kernels.order_keys(score_BM).topk(min(k, n_scores), dim=1).values & 0xFFFFFFFF)
    bits = (score_BM.float() + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    index = torch.arange(n_scores, device=score_BM.device)
    key = (ascending << 32) | (0xFFFFFFFF - index)
    best = key.topk(min(k, n_scores), dim=1).values
    return 0xFFFFFFFF - (best & 0xFFFFFFFF)


def top_entries(
    rows: Chunks,
    highest_SC: Tensor,
    sample_S: Tensor,
    slot_S: Tensor,
    place_S: Tensor,
    *,
    n_samples: int,
    n_slots: int,
    k: int,
) -> Candidates:
    """The k highest entries of every sample among rows of contributions that come in any order.

    Three levels, all exact: the k highest entries are in the k rows with the highest maxima, and there in the k chunks
    with the highest maxima, so only those chunks are ranked in full.

    Args:
        rows: the contributions.
        highest_SC: their `Summary.highest_SC`.
        sample_S: int64 ``[S]``, the sample of each row.
        slot_S: int64 ``[S]``, the row's number inside its sample, unique there and ascending with `place_S`.
        place_S: int64 ``[S]``, the place of the row's first entry; the entry of neuron j has ``place + j``.
        n_samples: B.
        n_slots: P, more than the highest slot.
        k: entries kept of each sample.
    """
    if rows.n_rows == 0:
        return Candidates.none(n_samples, k, highest_SC.device)
    n_chunks = rows.n_chunks
    row_BP = torch.full((n_samples * n_slots,), -1, dtype=torch.int64, device=highest_SC.device)
    row_BP[sample_S * n_slots + slot_S] = torch.arange(rows.n_rows, device=highest_SC.device)
    row_BK = row_BP.view(n_samples, n_slots)
    if n_slots > k:
        highest_BP = highest_SC.amax(-1)[row_BK].masked_fill_(row_BK < 0, NOTHING)
        row_BK = row_BK.gather(1, ordered_topk(highest_BP, k).sort(dim=1).values)  # ascending: places stay in order
    highest_BKC = highest_SC[row_BK].masked_fill_(row_BK[..., None] < 0, NOTHING)

    chosen_Bk = ordered_topk(highest_BKC.flatten(1), k).sort(dim=1).values
    row_Bk, chunk_Bk = row_BK.gather(1, chosen_Bk // n_chunks), chosen_Bk % n_chunks
    score_Bkc = rows.of_chunks(row_Bk.clamp(min=0).flatten(), chunk_Bk.flatten()).view(*row_Bk.shape, CHUNK)
    score_Bkc = score_Bkc.masked_fill_(row_Bk[..., None] < 0, NOTHING)

    best_Bk = ordered_topk(score_Bkc.flatten(1), k)
    score_Bk = score_Bkc.flatten(1).gather(1, best_Bk)
    chunk_of_best_Bk = best_Bk // CHUNK
    place_Bk = place_S[row_Bk.gather(1, chunk_of_best_Bk)] + chunk_Bk.gather(1, chunk_of_best_Bk) * CHUNK
    place_Bk += best_Bk % CHUNK
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

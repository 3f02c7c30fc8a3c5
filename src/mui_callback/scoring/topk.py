"""Exact, deterministic selection of a sample's highest contributions.

Equal scores are ordered by their place (position, expert, neuron), so the result does not depend on the batch
that a sample came in, on how its rows were cut into pieces, or on the device's own top-k.

Shapes: B samples, S rows of scores (one token in one expert), W neurons of a row, P rows of a sample,
C chunks of a row, k entries that are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 64
NOTHING = float("-inf")
"""Score of an entry that does not exist."""


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


def ordered_topk(score_BM: Tensor, k: int) -> Tensor:
    """Indices, int64 ``[B, min(k, M)]``, of the k highest float32 scores; the lower index wins a tie.

    `torch.topk` leaves ties open, so the scores are ranked together with their index as one integer: the bits of
    the float in an order-preserving form above, the complement of the index below.
    """
    n_scores = score_BM.shape[1]
    bits = (score_BM.float() + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    index = torch.arange(n_scores, device=score_BM.device)
    key = (ascending << 32) | (0xFFFFFFFF - index)
    best = key.topk(min(k, n_scores), dim=1).values
    return 0xFFFFFFFF - (best & 0xFFFFFFFF)


def top_entries(
    score_SW: Tensor,
    sample_S: Tensor,
    slot_S: Tensor,
    place_S: Tensor,
    *,
    n_samples: int,
    n_slots: int,
    k: int,
) -> Candidates:
    """The k highest entries of every sample among rows of scores that come in any order.

    Two levels, both exact: the k chunks with the highest maxima hold the k highest entries, so only those chunks
    are ranked in full.

    Args:
        score_SW: float32 ``[S, W]``; minus infinity never counts.
        sample_S: int64 ``[S]``, the sample of each row.
        slot_S: int64 ``[S]``, the row's number inside its sample, unique there and ascending with `place_S`.
        place_S: int64 ``[S]``, the place of the row's first entry; the entry in column w has ``place + w``.
        n_samples: B.
        n_slots: P, more than the highest slot.
        k: entries kept of each sample.
    """
    if score_SW.shape[0] == 0:
        return Candidates.none(n_samples, k, score_SW.device)
    width = score_SW.shape[1]
    chunk = min(_CHUNK, width)
    padded_SW = torch.nn.functional.pad(score_SW, (0, -width % chunk), value=NOTHING)
    chunked_SCc = padded_SW.view(score_SW.shape[0], -1, chunk)
    n_chunks = chunked_SCc.shape[1]

    highest_BPC = score_SW.new_full((n_samples, n_slots, n_chunks), NOTHING)
    highest_BPC[sample_S, slot_S] = chunked_SCc.amax(-1)
    row_BP = torch.zeros(n_samples, n_slots, dtype=torch.int64, device=score_SW.device)
    row_BP[sample_S, slot_S] = torch.arange(score_SW.shape[0], device=score_SW.device)

    highest_BM = highest_BPC.flatten(1)
    chosen_BK = ordered_topk(highest_BM, k).sort(dim=1).values  # ascending: the places below stay in order
    row_BK = row_BP.gather(1, chosen_BK // n_chunks)
    column_BK = (chosen_BK % n_chunks) * chunk
    score_BKc = chunked_SCc[row_BK, chosen_BK % n_chunks]
    is_row_BK = highest_BM.gather(1, chosen_BK) > NOTHING
    score_BKc = score_BKc.masked_fill(~is_row_BK[..., None], NOTHING)
    place_BKc = (place_S[row_BK] + column_BK)[..., None] + torch.arange(chunk, device=score_SW.device)

    best_Bk = ordered_topk(score_BKc.flatten(1), k)
    score_Bk = score_BKc.flatten(1).gather(1, best_Bk)
    place_Bk = place_BKc.flatten(1).gather(1, best_Bk)
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

"""What one pass over the contributions of layers finds, those of all kinds of experts together.

Each scored token of a sample has a slot for each of its rows, and each row has chunks of neurons. The k highest entries
of a sample are in the k chunks with the highest maxima, so only those are multiplied again.

Shapes: L layers that are looked at together, B samples, R scored tokens, S rows, P slots of a sample, X slots of all
samples, C chunks of the widest rows, k chunks of a sample that are chosen, M chunks, c neurons of a chunk, E experts, U
experts of all tokens in all layers.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mui_callback.fused import scores
from mui_callback.fused.scores import Found, Kind, Rows
from mui_callback.scoring.contributions import ExpertScores, Responses
from mui_callback.scoring.rows import CHUNK, NOTHING
from mui_callback.scoring.topk import Finalists, ordered_topk

Parts = Sequence[ExpertScores]
"""Kinds of experts of a layer, in the order of their neurons."""


@dataclass(frozen=True)
class LayerRows:
    """The contributions of layers that are alike (see `alike`) to the tokens of some samples, once looked at."""

    parts_L: tuple[Parts, ...]
    found: Found
    kinds: tuple[Kind, ...]
    """As kernels take them; none if there are no kernels for them."""

    @classmethod
    def of(cls, parts_L: Sequence[Parts], tokens: Responses, n_experts: int) -> LayerRows:
        """Look at all contributions.

        Args:
            parts_L: those of each layer.
            tokens: the scored tokens.
            n_experts: E.
        """
        parts, n_layers, device = parts_L[0], len(parts_L), tokens.row_R.device
        n_ranks, n_chunks = sum(part.rows_per_token for part in parts), max(part.rows.n_chunks for part in parts)
        slots = (n_layers, tokens.n_rows, tokens.n_orders * n_ranks)
        use = (len(tokens.row_R), n_layers, n_experts + 1, 2)
        kinds = _kinds(parts_L) if _are_fused(parts) else ()
        found = Found(
            torch.full((*slots, 1 + n_chunks), NOTHING, dtype=torch.float32, device=device),
            (torch.empty if kinds else torch.zeros)(slots, dtype=torch.int64, device=device),
            torch.zeros(use, dtype=torch.float64, device=device),
            torch.zeros((), dtype=torch.int64, device=device),
            n_ranks,
        )
        if kinds:
            scores.scan(kinds, tokens.place_R, CHUNK, found)
        else:
            for layer, own in enumerate(parts_L):
                for part, rows in _numbered(own):
                    _scan(part, rows, tokens.place_R, found, layer)
        return cls(tuple(parts_L), found, kinds)

    def use(self, tokens: Responses) -> Tensor:
        """Σ|f| and number of rows of each sample in each expert, those of one layer after the other, float64
        ``[B, L·E, 2]``."""
        use_RLE2 = self.found.use_RLE2
        use_BLE2 = tokens.by_sample(use_RLE2.flatten(1)).view(-1, *use_RLE2.shape[1:])
        return use_BLE2[:, :, :-1].flatten(1, 2)

    @property
    def highest_LB(self) -> Tensor:
        """The highest contribution of each sample, float32 ``[L, B]``; `NOTHING` if there is none."""
        highest_LBP = self.found.highest_LBPC[..., 0]
        return torch.nn.functional.pad(highest_LBP, (0, 1), value=NOTHING).amax(-1)  # there may be no slots

    def finalists(self, k: int, n_neurons: int) -> Finalists:
        """The chunks in which the k highest entries of each sample are, those of one layer after the other.

        Args:
            k: entries.
            n_neurons: those of a layer.
        """
        if self.kinds:
            chosen_LBk = scores.highest_chunks(self.found, k)
            score_LBkc, place_LBk = scores.finalists(chosen_LBk, self.kinds, n_neurons, CHUNK, self.found)
            return Finalists(score_LBkc.flatten(0, 1), place_LBk.flatten(0, 1))
        return Finalists.joined([self._finalists(layer, k, n_neurons) for layer in range(len(self.parts_L))])

    def _finalists(self, layer: int, k: int, n_neurons: int) -> Finalists:
        found, n_chunks = self.found, self.found.n_chunks
        highest_BM = found.highest_LBPC[layer, ..., 1:].flatten(1)
        chosen_Bk = ordered_topk(highest_BM, k)
        slot_Bk, chunk_Bk = chosen_Bk // n_chunks, chosen_Bk % n_chunks
        row_Bk = found.row_LBP[layer].gather(1, slot_Bk)
        score_Mc, neuron_M = self.of_chunks(layer, row_Bk.flatten(), chunk_Bk.flatten())
        is_missing_Bk = highest_BM.gather(1, chosen_Bk) == NOTHING
        score_Bkc = score_Mc.view(*chosen_Bk.shape, CHUNK).masked_fill_(is_missing_Bk[..., None], NOTHING)
        return Finalists(score_Bkc, slot_Bk // found.n_ranks * n_neurons + neuron_M.view_as(chosen_Bk))

    def of_chunks(self, layer: int, row_M: Tensor, chunk_M: Tensor) -> tuple[Tensor, Tensor]:
        """The contributions of some chunks, float32 ``[M, c]``, and the neuron of the first of each, int64 ``[M]``.

        Args:
            layer: which of these layers.
            row_M: number of the row of each, among those of all kinds.
            chunk_M: number of each in its row.
        """
        score_Mc = torch.full((len(row_M), CHUNK), NOTHING, dtype=torch.float32, device=row_M.device)
        neuron_M = chunk_M * CHUNK
        for part, rows in _numbered(self.parts_L[layer]):
            own_M, last = row_M - rows.first_row, part.rows.n_rows - 1
            is_own_M, own_M = (own_M >= 0) & (own_M <= last), own_M.clamp(0, last)
            score_Mc = part.rows.of_chunks(own_M, chunk_M).where(is_own_M[:, None], score_Mc)
            neuron_M = neuron_M + part.first_neuron_S[own_M].where(is_own_M, 0)
        return score_Mc, neuron_M


def can_wait(parts: Parts) -> bool:
    """Whether a layer may be looked at later, together with others: there are kernels, and nobody writes to it."""
    return _are_fused(parts) and not any(part.rows.is_lent for part in parts)


def n_bytes(parts: Parts, tokens: Responses, n_experts: int) -> int:
    """What a layer takes: the factors of its contributions, and what is found of them."""
    n_slots = tokens.n_rows * tokens.n_orders * sum(part.rows_per_token for part in parts)
    n_chunks = max(part.rows.n_chunks for part in parts)
    found = n_slots * (4 * (1 + n_chunks) + 8) + 16 * len(tokens.row_R) * (n_experts + 1)
    return found + sum(part.rows.act.nbytes + part.rows.projected_SI.nbytes for part in parts)


def _are_fused(parts: Parts) -> bool:
    with_rows = [part.rows for part in parts if part.rows.n_rows]
    return bool(with_rows) and all(rows.is_fused for rows in with_rows)


def alike(parts: Parts) -> Hashable:
    """The same for layers that kernels may take together."""
    return _are_fused(parts), *(
        (part.rows.n_rows > 0, part.rows.factors.layout, part.rows_per_token, part.first_expert, part.first_neuron)
        for part in parts
    )


def _kinds(parts_L: Sequence[Parts]) -> tuple[Kind, ...]:
    rows_LK = [[(part.rows.factors, rows) for part, rows in _numbered(parts)] for parts in parts_L]
    return scores.kinds_of(list(zip(*rows_LK, strict=True)))


def _numbered(parts: Parts) -> Iterator[tuple[ExpertScores, Rows]]:
    """Those kinds of experts that have rows, and which these are."""
    first_row = first_rank = 0
    for part in parts:
        if part.rows.n_rows:
            firsts = (first_row, first_rank, part.first_expert, part.first_neuron)
            yield part, Rows(part.token_S, part.expert_S, part.rank_S, *firsts)
        first_row += part.rows.n_rows
        first_rank += part.rows_per_token


def _scan(part: ExpertScores, rows: Rows, place_R: Tensor, found: Found, layer: int) -> None:
    """See `mui_callback.fused.scores.scan`."""
    summary, is_row_S = part.rows.summary(), part.rows.is_row_S
    slot_S = place_R[part.token_S] * found.n_ranks + (part.rank_S + rows.first_rank)
    n_chunks, n_experts = part.rows.n_chunks, found.use_RLE2.shape[2] - 1
    highest_XC = found.highest_LBPC[layer].view(-1, 1 + found.n_chunks)
    highest_SC = torch.cat([summary.highest_SC.amax(1, keepdim=True), summary.highest_SC], 1)
    highest_XC[:, : 1 + n_chunks].index_copy_(0, slot_S, highest_SC)
    found.row_LBP[layer].view(-1)[slot_S] = torch.arange(part.rows.n_rows, device=slot_S.device) + rows.first_row
    expert_S = part.expert_S if is_row_S is None else part.expert_S.where(is_row_S, n_experts)
    use_S = (part.token_S * found.use_RLE2.shape[1] + layer) * (n_experts + 1) + expert_S  # one index is faster
    mass_U, n_rows_U = found.use_RLE2.view(-1, 2).unbind(-1)
    mass_U[use_S] = summary.mass_S.double()  # not added to: a token has one row in an expert
    n_rows_U[use_S] = n_rows_U.new_ones(())
    found.n_not_finite.add_(summary.n_not_finite)

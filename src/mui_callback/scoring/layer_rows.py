"""What one pass over the contributions of a layer finds, those of all kinds of experts together.

Each scored token of a sample has a slot for each of its rows, and each row has chunks of neurons. The k highest entries
of a sample are in the k chunks with the highest maxima, so only those are multiplied again.

Shapes: B samples, R scored tokens, S rows, P slots of a sample, X slots of all samples, C chunks of the widest rows, k
chunks of a sample that are chosen, M chunks, c neurons of a chunk, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mui_callback.fused import scores
from mui_callback.fused.scores import Found, Rows
from mui_callback.scoring.contributions import ExpertScores
from mui_callback.scoring.layer_buffers import LayerBuffers
from mui_callback.scoring.rows import CHUNK, NOTHING
from mui_callback.scoring.topk import Finalists, ordered_topk


@dataclass(frozen=True)
class LayerRows:
    """The contributions of a layer to the tokens of some samples, once looked at."""

    parts: tuple[ExpertScores, ...]
    """By kind of experts, in the order of their neurons."""
    found: Found
    is_fused: bool
    """Whether there are kernels for all of them."""

    @classmethod
    def of(cls, parts: Sequence[ExpertScores], buffers: LayerBuffers, n_experts: int, layer: int = 0) -> LayerRows:
        """Look at all contributions of one kind of experts or of several.

        Args:
            parts: in the order of their neurons.
            buffers: where to leave what is found.
            n_experts: E.
            layer: number of the layer.
        """
        n_ranks, n_chunks = sum(part.rows_per_token for part in parts), max(part.rows.n_chunks for part in parts)
        found = buffers.take(layer, n_ranks, n_chunks, n_experts)
        numbered = list(_numbered(parts))
        is_fused = bool(numbered) and all(part.rows.is_fused for part, _ in numbered)
        for part, rows in numbered:
            if is_fused:
                scores.scan(part.rows.factors, rows, buffers.tokens.place_R, CHUNK, found)
            else:
                _scan(part, rows, buffers.tokens.place_R, found)
        return cls(tuple(parts), found, is_fused)

    @property
    def highest_B(self) -> Tensor:
        """The highest contribution of each sample, float32 ``[B]``; `NOTHING` if there is none."""
        highest_BP = self.found.highest_BPC[..., 0]
        return torch.nn.functional.pad(highest_BP, (0, 1), value=NOTHING).amax(1)  # there may be no slots

    def finalists(self, k: int, n_neurons: int) -> Finalists:
        """The chunks in which the k highest entries of each sample are.

        Args:
            k: entries.
            n_neurons: those of the layer.
        """
        if self.is_fused:
            numbered = _numbered(self.parts)
            of_kinds = [(part.rows.factors, rows, part.first_expert, part.first_neuron) for part, rows in numbered]
            chosen_Bk = scores.highest_chunks(self.found, k)
            return Finalists(*scores.finalists(chosen_Bk, of_kinds, n_neurons, CHUNK, self.found))
        highest_BM, n_chunks = self.found.highest_BPC[..., 1:].flatten(1), self.found.n_chunks
        chosen_Bk = ordered_topk(highest_BM, k)
        slot_Bk, chunk_Bk = chosen_Bk // n_chunks, chosen_Bk % n_chunks
        score_Mc, neuron_M = self.of_chunks(self.found.row_BP.gather(1, slot_Bk).flatten(), chunk_Bk.flatten())
        is_missing_Bk = highest_BM.gather(1, chosen_Bk) == NOTHING
        score_Bkc = score_Mc.view(*chosen_Bk.shape, CHUNK).masked_fill_(is_missing_Bk[..., None], NOTHING)
        return Finalists(score_Bkc, slot_Bk // self.found.n_ranks * n_neurons + neuron_M.view_as(chosen_Bk))

    def of_chunks(self, row_M: Tensor, chunk_M: Tensor) -> tuple[Tensor, Tensor]:
        """The contributions of some chunks, float32 ``[M, c]``, and the neuron of the first of each, int64 ``[M]``.

        Args:
            row_M: number of the row of each, among those of all kinds.
            chunk_M: number of each in its row.
        """
        score_Mc = torch.full((len(row_M), CHUNK), NOTHING, dtype=torch.float32, device=row_M.device)
        neuron_M = chunk_M * CHUNK
        for part, rows in _numbered(self.parts):
            own_M, last = row_M - rows.first_row, part.rows.n_rows - 1
            is_own_M, own_M = (own_M >= 0) & (own_M <= last), own_M.clamp(0, last)
            score_Mc = part.rows.of_chunks(own_M, chunk_M).where(is_own_M[:, None], score_Mc)
            neuron_M = neuron_M + part.first_neuron_S[own_M].where(is_own_M, 0)
        return score_Mc, neuron_M


def _numbered(parts: Sequence[ExpertScores]) -> Iterator[tuple[ExpertScores, Rows]]:
    """Those kinds of experts that have rows, and which these are."""
    first_row = first_rank = 0
    for part in parts:
        if part.rows.n_rows:
            yield part, Rows(part.token_S, part.expert_S, part.rank_S, first_row, first_rank)
        first_row += part.rows.n_rows
        first_rank += part.rows_per_token


def _scan(part: ExpertScores, rows: Rows, place_R: Tensor, found: Found) -> None:
    """See `mui_callback.fused.scores.scan`."""
    summary, is_row_S = part.rows.summary(), part.rows.is_row_S
    slot_S = place_R[part.token_S] * found.n_ranks + (part.rank_S + rows.first_rank)
    n_chunks, n_experts = part.rows.n_chunks, found.use_RE2.shape[1] - 1
    highest_XC = found.highest_BPC.view(-1, 1 + found.n_chunks)
    highest_SC = torch.cat([summary.highest_SC.amax(1, keepdim=True), summary.highest_SC], 1)
    highest_XC[:, : 1 + n_chunks].index_copy_(0, slot_S, highest_SC)
    found.row_BP.view(-1)[slot_S] = torch.arange(part.rows.n_rows, device=slot_S.device) + rows.first_row
    expert_S = part.expert_S if is_row_S is None else part.expert_S.where(is_row_S, n_experts)
    use_S2 = torch.stack([summary.mass_S, torch.ones_like(summary.mass_S)], dim=1).double()
    found.use_RE2[part.token_S, expert_S] = use_S2  # not added: a token has one row in an expert
    found.n_not_finite.add_(summary.n_not_finite)

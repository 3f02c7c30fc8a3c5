"""Passes over contributions and logits.

They compute what `mui_callback.scoring` and `mui_callback.probe.head` do without them: products are the same to the
bit, sums up to rounding in float32.

Shapes: S rows, I neurons of an expert, B samples, P slots for the rows of a sample, C chunks of neurons of a row, c
neurons of a chunk, k chunks of a sample that are chosen, K slots of a sample that are, M scores of a sample, E experts,
R scored tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mui_callback.fused.available import can_run

_BLOCK = 1024
"""Neurons that are in registers at a time."""
_SELECTED = 2048
"""Scores that are."""
_LOGITS = 4096
"""Logits that are."""


@dataclass(frozen=True)
class Factors:
    """What contributions are made of; see `mui_callback.scoring.rows.Contributions`."""

    act: Tensor
    act_row_S: Tensor | None
    projected_SI: Tensor
    weight_S: Tensor | None
    is_row_S: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them, in the order in which kernels take them."""
        return self.act, self.act_row_S, self.projected_SI, self.weight_S, self.is_row_S

    @property
    def flags(self) -> dict[str, bool]:
        """Which of them there are."""
        return {
            "HAS_ACT_ROW": self.act_row_S is not None,
            "HAS_WEIGHT": self.weight_S is not None,
            "HAS_ROWS": self.is_row_S is not None,
        }

    @property
    def strides(self) -> tuple[int, int]:
        """From row to row."""
        return self.act.stride(0), self.projected_SI.stride(0)


@dataclass(frozen=True)
class Rows:
    """Which rows they are, int64 ``[S]`` each; see `mui_callback.scoring.contributions.ExpertScores`."""

    token_S: Tensor
    expert_S: Tensor
    rank_S: Tensor
    first_row: int
    """Number of the first of them among the rows of the layer."""
    first_rank: int
    """Number of their lowest rank among the ranks of a token in the layer."""


@dataclass(frozen=True)
class Found:
    """What one pass over the contributions of a layer finds.

    Each scored token of a sample has a slot for each of its rows.
    """

    highest_BPC: Tensor
    """The highest finite contribution of each slot and, behind it, of each of its chunks, float32 ``[B, P, 1 + C]``;
    minus infinity where there is none."""
    row_BP: Tensor
    """Number of the row in each slot, those of all kinds of experts one after the other, int64; anything where there
    is none."""
    use_RE2: Tensor
    """Σ|f| of each token in each expert, and how many rows it has there, float64 ``[R, E + 1, 2]``; the last expert is
    for what is no row."""
    n_not_finite: Tensor
    """How many are NaN or infinite, and do not count; int32 scalar."""
    n_ranks: int
    """Slots of a token."""

    @property
    def n_slots(self) -> int:
        """P."""
        return self.row_BP.shape[1]

    @property
    def n_chunks(self) -> int:
        """C."""
        return self.highest_BPC.shape[2] - 1


def scan(factors: Factors, rows: Rows, place_R: Tensor, chunk: int, found: Found) -> None:
    """One pass over the contributions of some experts, whose results are added to those of the layer.

    Args:
        factors: what the contributions are made of.
        rows: which they are.
        place_R: number of each scored token among the places for those of all samples, int64.
        chunk: c.
        found: is written to.
    """
    n_rows, width = factors.projected_SI.shape
    n_own = -(-width // chunk)
    block = min(max(1, _BLOCK // chunk), 1 << (n_own - 1).bit_length())
    _kernels().scan.launch(
        (n_rows,),
        *(*factors.tensors, rows.token_S, rows.expert_S, rows.rank_S, place_R),
        *(found.highest_BPC, found.row_BP, found.use_RE2, found.n_not_finite),
        *(width, found.n_chunks, found.n_ranks, found.use_RE2.shape[1] - 1, found.use_RE2.stride(0)),
        *(rows.first_row, rows.first_rank),
        *factors.strides,
        **factors.flags,
        CHUNK=chunk,
        BLOCK=block,
    )


def sums(factors: Factors) -> Tensor:
    """Σ f of each row, float32 ``[S]``."""
    n_rows, width = factors.projected_SI.shape
    sum_S = torch.empty(n_rows, dtype=torch.float32, device=factors.act.device)
    _kernels().sums.launch(
        (n_rows,), *(*factors.tensors, sum_S, width, *factors.strides), **factors.flags, BLOCK=_BLOCK
    )
    return sum_S


def highest_chunks(found: Found, k: int) -> Tensor:
    """The k chunks of each sample with the highest scores, of equal ones the first, int64 ``[B, min(k, P·C)]``.

    They are numbered slot by slot, ascending.
    """
    n_samples, n_slots, n_chunks = len(found.row_BP), found.n_slots, found.n_chunks
    n_kept_slots = min(k, n_slots)
    n_kept = min(k, n_kept_slots * n_chunks)
    chosen_Bk = found.row_BP.new_empty(n_samples, n_kept)
    slots_Bk = found.row_BP.new_empty(n_samples, n_kept_slots) if n_kept_slots < n_slots else None
    _kernels().choose.launch(
        (n_samples,),
        *(found.highest_BPC, slots_Bk, chosen_Bk, n_slots, n_chunks, n_kept_slots, n_kept),
        HAS_SLOTS=slots_Bk is not None,
        BLOCK=_SELECTED,
        num_warps=8,
    )
    return chosen_Bk


def finalists(
    chosen_Bk: Tensor,
    parts: list[tuple[Factors, Rows, int, int]],
    n_neurons: int,
    chunk: int,
    found: Found,
) -> tuple[Tensor, Tensor]:
    """The contributions of chosen chunks, float32 ``[B, k, c]``, and the place of the first of each, int64 ``[B, k]``.

    Args:
        chosen_Bk: which, as `highest_chunks` numbers them.
        parts: the kinds of experts of the layer, each with the numbers of its first expert and neuron there.
        n_neurons: those of the layer.
        chunk: c.
        found: of the scans of all parts.
    """
    (n_samples, n_kept), device = chosen_Bk.shape, chosen_Bk.device
    score_Bkc = torch.empty(n_samples, n_kept, chunk, dtype=torch.float32, device=device)
    place_Bk = torch.empty_like(chosen_Bk)
    for number, (factors, rows, first_expert, first_neuron) in enumerate(parts):
        n_rows, width = factors.projected_SI.shape
        _kernels().finalists.launch(
            (n_samples * n_kept,),
            *(chosen_Bk, found.highest_BPC, found.row_BP, *factors.tensors, rows.expert_S, score_Bkc, place_Bk),
            *(n_kept, found.n_slots, found.n_chunks, found.n_ranks, n_rows, rows.first_row),
            *(first_expert, first_neuron, n_neurons, width, *factors.strides),
            **factors.flags,
            IS_FIRST=number == 0,
            CHUNK=chunk,
            num_warps=1,
        )
    return score_Bkc, place_Bk


def can_order(score_BM: Tensor) -> bool:
    """Whether there is a kernel for `order_keys` of these scores."""
    return score_BM.dtype == torch.float32 and score_BM.is_contiguous() and can_run(score_BM)


def order_keys(score_BM: Tensor) -> Tensor:
    """Numbers that are in the order of the scores and, of equal ones, against that of the columns, int64 ``[B, M]``."""
    key_BM = torch.empty(score_BM.shape, dtype=torch.int64, device=score_BM.device)
    n_scores = score_BM.numel()
    _kernels().order_keys.launch((-(-n_scores // _BLOCK),), score_BM, key_BM, n_scores, score_BM.shape[1], BLOCK=_BLOCK)
    return key_BM


def can_predict(logits_RV: Tensor) -> bool:
    """Whether there is a kernel for `predictions` of these logits."""
    return logits_RV.dtype.itemsize <= 4 and can_run(logits_RV)


def predictions(logits_RV: Tensor, target_R: Tensor) -> tuple[Tensor, Tensor]:
    """See `mui_callback.probe.head.token_losses`."""
    n_rows, n_logits = logits_RV.shape
    loss_R = torch.empty(n_rows, dtype=torch.float32, device=logits_RV.device)
    is_correct_R = torch.empty(n_rows, dtype=torch.bool, device=logits_RV.device)
    _kernels().predictions.launch(
        (n_rows,),
        *(logits_RV, target_R.contiguous(), loss_R, is_correct_R, n_logits, logits_RV.stride(0)),
        BLOCK=_LOGITS,
    )
    return loss_R, is_correct_R


def _kernels() -> Any:
    from mui_callback.fused import triton_scores

    return triton_scores

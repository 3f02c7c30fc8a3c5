"""Passes over contributions.

They compute what `mui_callback.scoring` does without them: products are the same to the bit, sums up to rounding in
float32.

Shapes: L layers, S rows, I neurons of an expert, B samples, P slots for the rows of a sample, C chunks of neurons of a
row, c neurons of a chunk, k chunks of a sample that are chosen, M scores of a sample, E experts, R scored tokens, K
kinds of experts, F fields of a table.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from mui_callback.fused.available import can_run

_BLOCK = 1024
"""Neurons that are in registers at a time."""
_SELECTED = 2048
"""Scores that are."""


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

    @cached_property
    def layout(self) -> Hashable:
        """The same for those that a kernel may take together: all but which tensors they are, and how many rows."""
        dtypes = (self.act.dtype, self.projected_SI.dtype)
        return dtypes, *self.flags.values(), self.projected_SI.shape[1], self.strides, self.are_aligned

    @cached_property
    def are_aligned(self) -> bool:
        """Whether all rows begin where 16 bytes can be read at once."""
        factors = (self.act, self.projected_SI)
        return all((one.data_ptr() | one.stride(0) * one.itemsize) % 16 == 0 for one in factors)


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
    first_expert: int
    """Number in the layer of the first of their experts."""
    first_neuron: int
    """Number in the layer of its first neuron."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in the order in which kernels take them."""
        return self.token_S, self.expert_S, self.rank_S


@dataclass(frozen=True)
class Kind:
    """One kind of experts of L layers, which differ in nothing but their tensors and how many rows they have."""

    factors: Factors
    """Of the first layer."""
    rows: Rows
    """Of the first layer."""
    n_rows: int
    """S of the layer that has most."""
    table_LF: Tensor
    """Where the tensors of each layer are, and its numbers, in the order in which kernels read them, int64. Whoever has
    it made has to keep the tensors."""

    @property
    def width(self) -> int:
        """I."""
        return self.factors.projected_SI.shape[1]

    @property
    def constants(self) -> dict[str, Any]:
        """What kernels are compiled for."""
        return {
            "ACT": _kernels().type_of(self.factors.act),
            "PROJECTED": _kernels().type_of(self.factors.projected_SI),
            "IS_ALIGNED": self.factors.are_aligned,
            **self.factors.flags,
        }


def kinds_of(rows_KL: Sequence[Sequence[tuple[Factors, Rows]]]) -> tuple[Kind, ...]:
    """Kinds of experts as kernels take them.

    Args:
        rows_KL: for each of K kinds and each layer, what its contributions are made of, and which rows they are.
    """
    table = [
        [
            [0 if tensor is None else tensor.data_ptr() for tensor in (*factors.tensors, *rows.tensors)]
            + [len(factors.projected_SI), rows.first_row]
            for factors, rows in rows_L
        ]
        for rows_L in rows_KL
    ]
    device = rows_KL[0][0][0].act.device
    table_KLF = torch.tensor(table, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    return tuple(
        Kind(*rows_L[0], max(len(factors.projected_SI) for factors, _ in rows_L), table_LF)
        for rows_L, table_LF in zip(rows_KL, table_KLF.unbind(0), strict=True)
    )


@dataclass(frozen=True)
class Found:
    """What one pass over the contributions of some layers finds.

    Each scored token of a sample has a slot for each of its rows.
    """

    highest_LBPC: Tensor
    """The highest finite contribution of each slot and, behind it, of each of its chunks, float32 ``[L, B, P, 1 + C]``;
    minus infinity where there is none."""
    row_LBP: Tensor
    """Number of the row in each slot, those of all kinds of experts one after the other, int64; anything where there
    is none."""
    use_RLE2: Tensor
    """Σ|f| of each token in each expert, and how many rows it has there, float64 ``[R, L, E + 1, 2]``; the last expert
    is for what is no row."""
    n_not_finite: Tensor
    """How many are NaN or infinite, and do not count; int64 scalar."""
    n_ranks: int
    """Slots of a token."""

    @property
    def n_slots(self) -> int:
        """P."""
        return self.row_LBP.shape[2]

    @property
    def n_chunks(self) -> int:
        """C."""
        return self.highest_LBPC.shape[3] - 1


def scan(kinds: Sequence[Kind], place_R: Tensor, chunk: int, found: Found) -> None:
    """One pass over the contributions of all experts of some layers.

    Args:
        kinds: what the contributions are made of.
        place_R: number of each scored token among the places for those of all samples, int64.
        chunk: c.
        found: is written to.
    """
    n_layers, n_experts = len(found.row_LBP), found.use_RLE2.shape[2] - 1
    for kind in kinds:
        n_own = -(-kind.width // chunk)
        _kernels().scan.launch(
            (kind.n_rows, n_layers),
            (kind.table_LF, place_R, found.highest_LBPC, found.row_LBP, found.use_RLE2, found.n_not_finite),
            (
                *(kind.width, found.n_chunks, found.n_ranks, n_experts, n_layers, found.row_LBP.stride(0)),
                *(kind.rows.first_rank, *kind.factors.strides),
            ),
            **kind.constants,
            CHUNK=chunk,
            BLOCK=min(max(1, _BLOCK // chunk), 1 << (n_own - 1).bit_length()),
        )


def sums(factors: Factors) -> Tensor:
    """Σ f of each row, float32 ``[S]``."""
    n_rows, width = factors.projected_SI.shape
    sum_S = torch.empty(n_rows, dtype=torch.float32, device=factors.act.device)
    _kernels().sums.launch(
        (n_rows,), (*factors.tensors, sum_S), (width, *factors.strides), **factors.flags, BLOCK=_BLOCK
    )
    return sum_S


def highest_chunks(found: Found, k: int) -> Tensor:
    """The k chunks of each sample with the highest scores, of equal ones the first, int64 ``[L, B, min(k, P·C)]``.

    They are numbered slot by slot, ascending.
    """
    samples, n_chunks = found.row_LBP.shape[:2], found.n_chunks
    n_kept_slots = min(k, found.n_slots)
    n_kept = min(k, n_kept_slots * n_chunks)
    chosen_LBk = found.row_LBP.new_empty(*samples, n_kept)
    slots_LBk = found.row_LBP.new_empty(*samples, n_kept_slots)
    _kernels().choose.launch(
        (samples.numel(),),
        (found.highest_LBPC, slots_LBk, chosen_LBk),
        (found.n_slots, n_chunks, n_kept_slots, n_kept),
        BLOCK=_SELECTED,
        num_warps=8,
    )
    return chosen_LBk


def finalists(
    chosen_LBk: Tensor, kinds: Sequence[Kind], n_neurons: int, chunk: int, found: Found
) -> tuple[Tensor, Tensor]:
    """The contributions of chosen chunks, float32 ``[L, B, k, c]``, and the place of the first of each, int64
    ``[L, B, k]``.

    Args:
        chosen_LBk: which, as `highest_chunks` numbers them.
        kinds: the kinds of experts of the layers.
        n_neurons: those of a layer.
        chunk: c.
        found: of the scan of all kinds.
    """
    n_layers, n_samples, n_kept = chosen_LBk.shape
    score_LBkc = torch.empty(*chosen_LBk.shape, chunk, dtype=torch.float32, device=chosen_LBk.device)
    place_LBk = torch.empty_like(chosen_LBk)
    for number, kind in enumerate(kinds):
        _kernels().finalists.launch(
            (n_samples * n_kept, n_layers),
            (kind.table_LF, chosen_LBk, found.highest_LBPC, found.row_LBP, score_LBkc, place_LBk),
            (
                *(n_samples, n_kept, found.n_slots, found.n_chunks, found.n_ranks),
                *(kind.rows.first_expert, kind.rows.first_neuron, n_neurons),
                *(kind.width, *kind.factors.strides),
            ),
            **kind.constants,
            IS_FIRST=number == 0,
            CHUNK=chunk,
            num_warps=1,
        )
    return score_LBkc, place_LBk


def can_order(score_BM: Tensor) -> bool:
    """Whether there is a kernel for `order_keys` of these scores."""
    return score_BM.dtype == torch.float32 and score_BM.is_contiguous() and can_run(score_BM)


def order_keys(score_BM: Tensor) -> Tensor:
    """Numbers that are in the order of the scores and, of equal ones, against that of the columns, int64 ``[B, M]``."""
    key_BM = torch.empty(score_BM.shape, dtype=torch.int64, device=score_BM.device)
    n_scores = score_BM.numel()
    _kernels().order_keys.launch(
        (-(-n_scores // _BLOCK),), (score_BM, key_BM), (n_scores, score_BM.shape[1]), BLOCK=_BLOCK
    )
    return key_BM


@cache
def _kernels() -> Any:
    from mui_callback.fused import triton_scores

    return triton_scores

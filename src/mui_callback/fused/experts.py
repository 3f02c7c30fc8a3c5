"""What surrounds the matrix products of experts, in one pass each.

Shapes: T tokens, K experts of a token, S = T·K rows of a token in an expert, I neurons of an expert, D width of its
output, E experts, P rows of scored tokens; 2: of all tokens, and of scored ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mui_callback.fused.available import can_run

_BLOCK = 1024
_PAIRS = 256
"""Pairs that a program sorts."""
_FEW_PAIRS = 2**14
"""Pairs that each program may count by itself."""
_COMPARED = 16
"""Pairs that are compared with those of a program at a time; with more, not all are in registers."""
_BINS = 32
"""Experts, at least, that are counted together."""
_COUNTS = 64
"""Programs whose counts are added up at a time."""
_EXPERTS = 512
"""Experts, at most, that pairs are sorted by."""


@dataclass(frozen=True)
class Gate:
    """How the two halves of an up projection become activations.

    ``act(x·W_g) · (x·W_u)`` with the SiLU, of halves that lie behind each other; or that of GPT-OSS, where they
    alternate: ``(u + 1) · g · sigmoid(alpha · g)`` of both clamped to `limit`, g from above only.
    """

    is_interleaved: bool = False
    alpha: float = 1.0
    limit: float = 1.0


def gated(gate: Gate, up_S2: Tensor, bias_E2: Tensor | None, expert_S: Tensor) -> Tensor:
    """Activations ``[S, I]`` in the dtype of the up projection, whose bias is added before.

    Args:
        gate: how they are made.
        up_S2: ``[S, 2·I]``.
        bias_E2: ``[E, 2·I]``.
        expert_S: int64 ``[S]``, for the bias.
    """
    (n_rows, n_columns), width = up_S2.shape, up_S2.shape[1] // 2
    act_SI = up_S2.new_empty(n_rows, n_columns // 2)
    _kernels().gated.launch(
        (n_rows, -(-width // _BLOCK)),
        (up_S2, bias_E2, expert_S, act_SI),
        (width, up_S2.stride(0), gate.alpha, gate.limit),
        HAS_BIAS=bias_E2 is not None,
        IS_INTERLEAVED=gate.is_interleaved,
        BLOCK=_BLOCK,
    )
    return act_SI


def combined(
    raw_SD: Tensor, bias_ED: Tensor | None, row_TK: Tensor, expert_TK: Tensor, weight_TK: Tensor, n_local: int
) -> Tensor:
    """Σ_k weight · (output + bias) of each token, added up in float32, ``[T, D]`` in the dtype of the output.

    Args:
        raw_SD: outputs of the experts.
        bias_ED: what is added to them.
        row_TK: which row is whose, int64.
        expert_TK: int64; those of `n_local` and more count as zero.
        weight_TK: of any floating-point type.
        n_local: E.
    """
    (n_tokens, top_k), width = row_TK.shape, raw_SD.shape[1]
    out_TD = raw_SD.new_empty(n_tokens, width)
    _kernels().combined.launch(
        (n_tokens, -(-width // _BLOCK)),
        (raw_SD, bias_ED, row_TK, expert_TK.contiguous(), weight_TK.contiguous(), out_TD),
        (width, n_local),
        HAS_BIAS=bias_ED is not None,
        TOP_K=top_k,
        BLOCK=_BLOCK,
    )
    return out_TD


def can_sort(expert_TK: Tensor, weight_TK: Tensor, n_local: int) -> bool:
    """Whether there are kernels for `sort_pairs`."""
    return n_local <= _EXPERTS and can_run(expert_TK, weight_TK)


def sort_pairs(
    expert_TK: Tensor, weight_TK: Tensor, n_local: int, number_T: Tensor, first: int, n_scored: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The fields of `mui_callback.experts.pairs.SortedRows` and, of scored tokens, those of `Pairs` there.

    Args:
        expert_TK: experts of each token, int64; those of `n_local` and more are none.
        weight_TK: routing weights, of any floating-point type.
        n_local: E.
        number_T: number of the scored token, int64; -1 where none is scored.
        first: the number of the first token that is scored.
        n_scored: how many are.
    """
    (n_tokens, top_k), device = expert_TK.shape, expert_TK.device
    n_pairs = n_tokens * top_k
    bins, n_blocks = max(_BINS, 1 << (n_local - 1).bit_length()), -(-n_pairs // _PAIRS)
    constants = {"TOP_K": top_k, "BINS": bins, "BLOCK": _PAIRS}
    expert_TK = expert_TK.contiguous()
    counts = _counts(expert_TK, number_T, n_local, constants) if n_pairs > _FEW_PAIRS else None
    starts = torch.empty(2, n_blocks, bins, dtype=torch.int32, device=device)
    end_2E = torch.empty(2, n_local, dtype=torch.int32, device=device)
    order_S, from_S, expert_S, row_S = torch.empty(4, n_pairs, dtype=torch.int64, device=device).unbind(0)
    of_scored = _of_pairs(n_scored * top_k, device)
    _kernels().sort.launch(
        (n_blocks,),
        (
            *(expert_TK, weight_TK.contiguous(), number_T, counts, starts, end_2E),
            *(order_S, from_S, expert_S, row_S, *of_scored),
        ),
        (n_pairs, n_local, first),
        **constants,
        ARE_COUNTED=counts is not None,
        TILE=_COMPARED,
    )
    return (order_S, from_S, expert_S, row_S.view(n_tokens, top_k), end_2E[0]), (*of_scored, end_2E[1])


def _counts(expert_TK: Tensor, number_T: Tensor, n_local: int, constants: dict[str, int]) -> Tensor:
    """Pairs of each expert before those of each program, and in all, int32; and of scored tokens behind these."""
    n_pairs, bins = expert_TK.numel(), constants["BINS"]
    n_blocks = -(-n_pairs // _PAIRS)
    counts = torch.empty(2, n_blocks + 1, bins, dtype=torch.int32, device=expert_TK.device)
    _kernels().count.launch((n_blocks,), (expert_TK, number_T, counts), (n_pairs, n_local), **constants)
    _kernels().accumulate.launch((2, bins // _BINS), (counts,), (n_blocks,), BINS=bins, BINS_HERE=_BINS, TILE=_COUNTS)
    return counts


def _of_pairs(n_pairs: int, device: torch.device) -> tuple[Tensor, ...]:
    """Empty fields of `Pairs`."""
    from_P, expert_P, row_P, rank_P = torch.empty(4, n_pairs, dtype=torch.int64, device=device).unbind(0)
    weight_P = torch.empty(n_pairs, dtype=torch.float32, device=device)
    is_row_P = torch.empty(n_pairs, dtype=torch.bool, device=device)
    return from_P, expert_P, weight_P, row_P, rank_P, is_row_P


@cache
def _kernels() -> Any:
    from mui_callback.fused import triton_experts

    return triton_experts

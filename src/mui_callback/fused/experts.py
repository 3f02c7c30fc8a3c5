"""What surrounds the matrix products of experts, in one pass each.

Shapes: T tokens, K experts of a token, S = T·K rows of a token in an expert, I neurons of an expert, D width of its
output, E experts, P rows of scored tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_BLOCK = 1024
_PAIRS = 256


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
    with torch.cuda.device(up_S2.device):
        _kernels().gated[(n_rows, -(-width // _BLOCK))](
            *(up_S2, bias_E2, expert_S, act_SI, width, up_S2.stride(0), gate.alpha, gate.limit),
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
    with torch.cuda.device(raw_SD.device):
        _kernels().combined[(n_tokens, -(-width // _BLOCK))](
            *(raw_SD, bias_ED, row_TK, expert_TK.contiguous(), weight_TK.contiguous(), out_TD, width, n_local),
            HAS_BIAS=bias_ED is not None,
            TOP_K=top_k,
            BLOCK=_BLOCK,
        )
    return out_TD


def pairs(
    order_S: Tensor,
    n_scored_S: Tensor,
    number_T: Tensor,
    expert_TK: Tensor,
    weight_TK: Tensor,
    *,
    n_pairs: int,
    n_local: int,
    first: int,
) -> tuple[Tensor, ...]:
    """The fields of `mui_callback.experts.pairs.Pairs`, of the rows of scored tokens among all, sorted by expert.

    Args:
        order_S: which pair of T · K each row is, int64.
        n_scored_S: how many rows up to each, itself included, are of scored tokens, int64.
        number_T: number of the scored token, int64; -1 where none is scored.
        expert_TK: experts of each token, int64; those of `n_local` and more are none.
        weight_TK: routing weights, of any floating-point type.
        n_pairs: P.
        n_local: E.
        first: the number of the first token that is scored.
    """
    from_P, expert_P, row_P, rank_P = order_S.new_empty(4, n_pairs).unbind(0)
    weight_P = torch.empty(n_pairs, dtype=torch.float32, device=order_S.device)
    is_row_P = torch.empty(n_pairs, dtype=torch.bool, device=order_S.device)
    with torch.cuda.device(order_S.device):
        _kernels().pairs[(-(-len(order_S) // _PAIRS),)](
            *(order_S, n_scored_S, number_T, expert_TK.contiguous(), weight_TK.contiguous()),
            *(from_P, expert_P, weight_P, row_P, rank_P, is_row_P, len(order_S), n_local, first),
            TOP_K=expert_TK.shape[1],
            BLOCK=_PAIRS,
        )
    return from_P, expert_P, weight_P, row_P, rank_P, is_row_P


def _kernels() -> Any:
    from mui_callback.fused import triton_experts

    return triton_experts

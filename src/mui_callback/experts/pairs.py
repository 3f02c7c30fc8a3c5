"""Pairs of tokens and their experts, sorted as one matrix product per expert wants them.

Shapes: T tokens that the experts were given, K experts of a token, S = T·K pairs, R tokens that are looked at, P = R·K
pairs of these, E experts of this process.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mui_callback.experts.grouped import group_ends, numbers
from mui_callback.fused import experts as fused
from mui_callback.scoring.contributions import ScoredTokens


@dataclass(frozen=True)
class SortedRows:
    """A row for each pair, those of the first expert first, and of each expert those of the first token."""

    order_S: Tensor
    """Which pair of T·K each row is, int64."""
    from_S: Tensor
    """Of which token, int64."""
    expert_S: Tensor
    """Number of the expert in this process, of any integer type; the last one where the router chose none of them."""
    row_TK: Tensor
    """Which row each pair is, int64."""
    end_E: Tensor
    """End of the rows of each expert, int32."""

    @classmethod
    def of(cls, expert_TK: Tensor, n_local: int) -> SortedRows:
        """All of them.

        Args:
            expert_TK: experts of each token, int64; those of `n_local` and more are none.
            n_local: E.
        """
        expert_S = expert_TK.flatten().clamp(max=n_local - 1)
        if expert_S.is_cuda and n_local <= 256:
            expert_S = expert_S.to(torch.uint8)  # sorted in one pass where int64 takes eight
        expert_S, order_S = expert_S.sort(stable=True)
        row_S = torch.empty_like(order_S)
        row_S[order_S] = numbers(len(order_S), order_S.dtype, order_S.device)
        end_E = group_ends(expert_S, n_local)
        return cls(order_S, order_S // expert_TK.shape[1], expert_S, row_S.view_as(expert_TK), end_E)


@dataclass(frozen=True)
class Pairs:
    """Pairs of scored tokens, those of the first expert first, and of each expert those of the first token."""

    from_P: Tensor
    """Which of the R it is of, int64."""
    expert_P: Tensor
    """Number of the expert in this process, int64."""
    weight_P: Tensor
    """Routing weight, float32."""
    row_P: Tensor
    """Where the activations are, int64."""
    rank_P: Tensor
    """Number among the pairs of its token, by expert, int64."""
    is_row_P: Tensor | None
    """False where the router chose no expert of this process, bool; None if it is known that there is no such pair."""
    end_E: Tensor
    """End of the pairs of each expert, int32."""

    @classmethod
    def of(cls, place_R: Tensor, expert_TK: Tensor, weight_TK: Tensor, row_TK: Tensor, n_local: int) -> Pairs:
        """All pairs of some tokens.

        Args:
            place_R: which tokens, int64.
            expert_TK: experts of each token, int64; those of `n_local` and more are none.
            weight_TK: routing weights, of any floating-point type.
            row_TK: where the activations of each pair are, int64.
            n_local: experts of this process.
        """
        top_k = expert_TK.shape[1]
        expert_RK = expert_TK[place_R]
        expert_P, order_P = expert_RK.flatten().sort(stable=True)
        # ranks by expert, and of none, of which a row may have several, by place
        rank_RK = expert_RK.sort(dim=1, stable=True).indices.argsort(dim=1)
        from_P = order_P // top_k
        pair_P = place_R[from_P] * top_k + order_P % top_k
        is_row_P, own_P = expert_P < n_local, expert_P.clamp(max=n_local - 1)
        return cls(
            from_P,
            own_P,
            weight_TK.flatten()[pair_P].float(),
            row_TK.flatten()[pair_P],
            rank_RK.flatten()[order_P],
            None if not is_row_P.is_cuda and bool(is_row_P.all()) else is_row_P,
            group_ends(own_P, n_local),
        )


def sort_pairs(
    expert_TK: Tensor, weight_TK: Tensor, n_local: int, tokens: ScoredTokens | None
) -> tuple[SortedRows, Pairs | None]:
    """The rows of all pairs and, where a kernel finds them on the way, the pairs of scored tokens.

    Args:
        expert_TK: experts of each token, int64; those of `n_local` and more are none.
        weight_TK: routing weights, of any floating-point type.
        n_local: E.
        tokens: the scored ones, if it is known that the experts are given the positions of the batch.
    """
    if not fused.can_sort(expert_TK, weight_TK, n_local):
        return SortedRows.of(expert_TK, n_local), None
    if tokens is not None and (not len(tokens.position_R) or len(tokens.number_T) != len(expert_TK)):
        tokens = None  # lengths that differ are refused later
    if tokens is None:
        scored = expert_TK.new_full((len(expert_TK),), -1), 0, 0
    else:
        scored = tokens.number_T, tokens.first, len(tokens.position_R)
    rows, pairs = fused.sort_pairs(expert_TK, weight_TK, n_local, *scored)
    return SortedRows(*rows), None if tokens is None else Pairs(*pairs)

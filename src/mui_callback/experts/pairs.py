"""Pairs of scored tokens and their experts, sorted as one matrix product per expert wants them.

Shapes: T rows that the experts were given, K experts of a row, R of these that are looked at, P = R·K.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """Those of the first expert first, and of each expert those of the first token."""

    from_P: Tensor
    """Which of the R it is of, int64."""
    expert_P: Tensor
    """Number of the expert in this process, int64."""
    weight_P: Tensor
    """Routing weight, float32."""
    row_P: Tensor
    """Where the activations are, int64."""
    rank_P: Tensor
    """Number among the pairs of its row, by expert, int64."""
    is_row_P: Tensor | None
    """False where the router chose no expert of this process, bool; None if it is known that there is no such pair."""

    @classmethod
    def of(cls, place_R: Tensor, expert_TK: Tensor, weight_TK: Tensor, row_TK: Tensor, n_local: int) -> Pairs:
        """All pairs of some rows.

        Args:
            place_R: which rows, int64.
            expert_TK: experts of each row, int64; those of `n_local` and more are none.
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
        is_row_P = expert_P < n_local
        return cls(
            from_P,
            expert_P.clamp(max=n_local - 1),
            weight_TK.flatten()[pair_P].float(),
            row_TK.flatten()[pair_P],
            rank_RK.flatten()[order_P],
            None if not is_row_P.is_cuda and bool(is_row_P.all()) else is_row_P,
        )

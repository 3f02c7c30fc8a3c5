"""Rows that a dispatch has announced, multiplied while the experts run.

Nothing has to be asked of the tail for them, so nothing is recorded, and of an expert's activations no more is kept
than the rows of scored tokens.

Shapes: R scored tokens that meet, P pairs of a scored token and an expert of this process, those of the first expert
first, L experts of this process, S rows of a product, I neurons of an expert, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mui_callback.errors import ProbeError
from mui_callback.experts.called_rows import CalledRows
from mui_callback.experts.dispatch import Arrivals
from mui_callback.experts.down import Product
from mui_callback.scoring.contributions import rank_in_token
from mui_callback.scoring.rows import Contributions


class FollowedRows:
    """The contributions of one layer in one forward pass. The host waits for the number of pairs.

    Args:
        came: what comes to the experts of this process.
        readout_RD: unembedding row of the target of each token.
        n_local: L.
        first_down: number of the first of these experts in the layer.
    """

    def __init__(self, came: Arrivals, readout_RD: Tensor, n_local: int, first_down: int) -> None:
        self._readout_RD = readout_RD
        self._first_down = first_down
        (place_P,) = torch.nonzero(came.token_N >= 0, as_tuple=True)
        self._expert_P = torch.searchsorted(came.first_L + came.n_L, place_P, right=True)
        self._in_expert_P = place_P - came.first_L[self._expert_P]
        self._token_P, self._weight_P = came.token_N[place_P], came.weight_N[place_P]
        self._rank_P, n_repeated = rank_in_token(self._token_P, self._expert_P, n_local)
        most = self._rank_P.max() if len(place_P) else place_P.new_full((), -1)
        experts = torch.arange(n_local + 1, device=place_P.device)
        bounds = torch.searchsorted(self._expert_P, experts)
        *self._bounds, highest, n_repeats = torch.cat([bounds, torch.stack([most, n_repeated])]).tolist()
        self._rows_per_token, self._are_repeated = max(highest + 1, 1), n_repeats > 0
        self._pairs: list[slice] = []
        self._act: list[Tensor] = []
        self._projected: list[Tensor] = []

    def add(self, first: int, product: Product, act_SI: Tensor) -> None:
        """Multiply the rows of one product.

        Args:
            first: number of its first expert among those of this process.
            product: the product, with its weight.
            act_SI: its activations, ``[S, I]``.

        Raises:
            ProbeError: it is not one of the announced ones.
        """
        n_experts = len(self._bounds) - 1 if product.expert_S is not None else product.n_experts
        pairs = slice(self._bounds[first], self._bounds[first + n_experts])
        place_P = self._in_expert_P[pairs]
        if product.expert_S is not None:
            experts = torch.arange(n_experts, device=place_P.device)
            place_P = place_P + torch.searchsorted(product.expert_S, experts)[self._expert_P[pairs]]
        elif n_experts > 1:
            place_P = place_P + (self._expert_P[pairs] - first) * (len(act_SI) // n_experts)
        if pairs.stop == pairs.start:
            return
        if not len(act_SI):
            raise ProbeError(f"expected rows of {pairs.stop - pairs.start} tokens in expert {first}, got none")
        if product.weight is None:
            raise ProbeError("expected down projections that are plain products, as in the first batch")
        place_P = place_P.clamp(max=len(act_SI) - 1)  # a GPU that reads behind the end is lost for training too
        self._pairs.append(pairs)
        self._act.append(act_SI[place_P])
        self._projected.append(product.projected(self._readout_RD[self._token_P[pairs]], place_P))

    def rows(self, width: int) -> tuple[CalledRows, Contributions]:
        """All of them, after the last product.

        Args:
            width: I.

        Raises:
            ProbeError: experts did not run, or ran twice.
        """
        order = sorted(range(len(self._pairs)), key=lambda number: self._pairs[number].start)
        ends = [0, *(self._pairs[number].stop for number in order)]
        if [*(self._pairs[number].start for number in order), self._bounds[-1]] != ends:
            raise ProbeError(
                f"expected each of {len(self._bounds) - 1} experts to run once on what was sent to it, got products "
                f"with pairs {[(pairs.start, pairs.stop) for pairs in self._pairs]} of {self._bounds[-1]}"
            )
        none = self._readout_RD.new_zeros(0, width)
        down_P = self._first_down + self._expert_P
        return (
            CalledRows(self._token_P, down_P, self._rank_P, self._rows_per_token, self._are_repeated),
            Contributions(
                _joined([self._act[number] for number in order] or [none]),
                _joined([self._projected[number] for number in order] or [none]),
                self._weight_P,
            ),
        )


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)

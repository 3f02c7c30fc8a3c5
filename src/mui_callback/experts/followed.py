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
from mui_callback.scoring.rows import Contributions, joined


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
        (place_P,) = torch.nonzero(came.token_N >= 0, as_tuple=True)
        self._expert_P = torch.searchsorted(came.first_L + came.n_L, place_P, right=True)
        self._in_expert_P = place_P - came.first_L[self._expert_P]
        self._weight_P = came.weight_N[place_P]
        bounds = torch.searchsorted(self._expert_P, torch.arange(n_local + 1, device=place_P.device))
        self._rows, self._bounds = CalledRows.ranked(
            came.token_N[place_P], first_down + self._expert_P, first_down + n_local, bounds
        )
        self._products: list[tuple[slice, Tensor, Tensor]] = []
        """Which pairs each of them had, their activations and what these are multiplied with."""

    def add(self, first: int, product: Product, act_SI: Tensor) -> None:
        """Multiply the rows of one product.

        Args:
            first: number of its first expert among those of this process.
            product: the product, with its weight.
            act_SI: its activations, ``[S, I]``.

        Raises:
            ProbeError: it is not one of the announced ones.
        """
        n_experts = len(self._bounds) - 1 if product.expert_S is not None else 1
        pairs = slice(self._bounds[first], self._bounds[first + n_experts])
        if pairs.stop == pairs.start:
            return
        if not len(act_SI):
            raise ProbeError(f"expected rows of {pairs.stop - pairs.start} tokens in expert {first}, got none")
        if product.weight is None:
            raise ProbeError("expected down projections that are plain products, as in the first batch")
        place_P = self._in_expert_P[pairs]
        if product.expert_S is not None:
            experts = torch.arange(n_experts, device=place_P.device)
            place_P = place_P + torch.searchsorted(product.expert_S, experts)[self._expert_P[pairs]]
        place_P = place_P.clamp(max=len(act_SI) - 1)  # a GPU that reads behind the end is lost for training too
        projected_PI = product.projected(self._readout_RD[self._rows.token_P[pairs]], place_P)
        self._products.append((pairs, act_SI[place_P], projected_PI))

    def rows(self, width: int) -> tuple[CalledRows, Contributions]:
        """All of them, after the last product.

        Args:
            width: I.

        Raises:
            ProbeError: experts did not run, or ran twice.
        """
        products = sorted(self._products, key=lambda product: product[0].start)
        reached = [(pairs.start, pairs.stop) for pairs, _, _ in products]
        if [*(start for start, _ in reached), self._bounds[-1]] != [0, *(stop for _, stop in reached)]:
            raise ProbeError(
                f"expected each of {len(self._bounds) - 1} experts to run once on what was sent to it, "
                f"{self._bounds[-1]} pairs in all, got products with the pairs {reached}"
            )
        none = self._readout_RD.new_zeros(0, width)
        act_PI = joined([act for _, act, _ in products] or [none])
        projected_PI = joined([projected for _, _, projected in products] or [none])
        return self._rows, Contributions(act_PI, projected_PI, self._weight_P)

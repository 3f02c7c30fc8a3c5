"""Rows that a dispatch has announced, multiplied while the experts run, or when it is known which they are.

Nothing has to be asked of the tail for them, so nothing is recorded.

Shapes: R scored tokens that meet, N pairs of a token and an expert of this process, P those of a scored token, L
experts of this process, S rows of a product, I neurons of an expert, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from mui_callback.errors import ProbeError
from mui_callback.experts.called_rows import CalledRows
from mui_callback.experts.cut import add_inner
from mui_callback.experts.dispatch import Sent
from mui_callback.experts.down import Product
from mui_callback.experts.host_copy import HostCopy
from mui_callback.scoring.contributions import rank_of_pair
from mui_callback.scoring.rows import Contributions


@dataclass(frozen=True)
class _Pairs:
    """Pairs of a scored token and an expert, those of the first expert first."""

    token_P: Tensor
    expert_P: Tensor
    """Number of the expert in this process."""
    in_expert_P: Tensor
    """Number of the row among those of its expert."""
    weight_P: Tensor
    rank_P: Tensor
    limits: HostCopy
    """How many rows a token has at most, and how many repeat another's."""

    def rows(self, first_down: int) -> CalledRows:
        most, n_repeated = self.limits.get()
        down_P = first_down + self.expert_P
        return CalledRows(self.token_P, down_P, self.rank_P, max(most, 1), are_repeated=n_repeated > 0)


class FollowedRows:
    """The contributions of one layer in one forward pass.

    All that can wait is left for the first product, when the device is busy with the experts.

    Args:
        sent: what comes to the experts of this process.
        readout_RD: unembedding row of the target of each token.
        n_local: L.
        first_down: number of the first of these experts in the layer.
    """

    def __init__(self, sent: Sent, readout_RD: Tensor, n_local: int, first_down: int) -> None:
        self.device = readout_RD.device
        self._sent = sent
        self._readout_RD = readout_RD
        self._n_local = n_local
        self._first_down = first_down
        self._reached: list[slice] = []
        """Which pairs each product had."""
        self._act: Tensor | None = None
        self._projected: Tensor | None = None
        """Activations of all pairs and what these are multiplied with, ``[P, I]`` each; filled by the products."""
        self._whole: Contributions | None = None
        """The contributions of all pairs, where one product had them; its activations are not copied."""
        self._waiting: list[tuple[int, Product, Tensor]] = []
        """Products whose pairs are not known yet."""
        self._kept: list[tuple[Tensor, int]] = []
        """Activations that are not copied, and how often they had been written to."""
        self._biases: list[tuple[slice, Tensor]] = []

    @cached_property
    def _bounds(self) -> list[int]:
        """Where the pairs of each expert begin among the P, and where those of the last one end."""
        return [0, *accumulate(self._sent.n_scored.get())]

    @cached_property
    def _pairs(self) -> _Pairs:
        came = self._sent.arrivals()
        wanted = torch.arange(1, self._bounds[-1] + 1, device=came.token_N.device)
        place_P = torch.searchsorted((came.token_N >= 0).cumsum(0), wanted)
        expert_P = torch.searchsorted(came.first_L + came.n_L, place_P, right=True)
        token_P = came.token_N[place_P]
        rank_P, most, n_repeated = rank_of_pair(token_P, expert_P, len(self._readout_RD), self._n_local)
        limits = torch.stack([most, n_repeated])
        return _Pairs(
            *(token_P, expert_P, place_P - came.first_L[expert_P], came.weight_N[place_P], rank_P, HostCopy(limits))
        )

    def add(self, first: int, product: Product, act_SI: Tensor) -> None:
        """Multiply the rows of one product.

        Args:
            first: number of its first expert among those of this process.
            product: the product, with its weight.
            act_SI: its activations, ``[S, I]``.

        Raises:
            ProbeError: it is not one of the announced ones.
        """
        if not self._sent.has_met:
            without_output = replace(product, out=act_SI[:0])  # which takes up memory, and is not asked for
            self._waiting.append((first, without_output, act_SI))
            self._kept.append((act_SI, act_SI._version))
            return
        n_experts = self._n_local if product.expert_S is not None else 1
        pairs = slice(self._bounds[first], self._bounds[first + n_experts])
        if pairs.stop == pairs.start:
            return
        if not len(act_SI):
            raise ProbeError(f"expected rows of {pairs.stop - pairs.start} tokens in expert {first}, got none")
        if product.weight is None:
            raise ProbeError("expected down projections that are plain products, as in the first batch")
        self._reached.append(pairs)
        if product.bias is not None:
            self._biases.append((pairs, product.bias))
        place_P, readout_PD = self._pairs.in_expert_P[pairs], self._readout_RD[self._pairs.token_P[pairs]]
        if product.expert_S is not None:
            first_L = torch.searchsorted(product.expert_S, torch.arange(n_experts, device=place_P.device))
            place_P = place_P + first_L[self._pairs.expert_P[pairs]]
        place_P = place_P.clamp(max=len(act_SI) - 1)  # a GPU that reads behind the end is lost for training too
        if pairs.stop - pairs.start == self._bounds[-1] and product.expert_S is not None:
            projected_PI = product.projected(readout_PD, place_P)
            self._whole = Contributions(act_SI, projected_PI, self._pairs.weight_P, act_row_S=place_P, is_lent=True)
            self._kept.append((act_SI, act_SI._version))
            return
        if self._act is None or self._projected is None:
            self._act = act_SI.new_empty(self._bounds[-1], act_SI.shape[1])
            self._projected = product.weight.new_empty(self._act.shape)
        torch.index_select(act_SI, 0, place_P, out=self._act[pairs])
        self._projected[pairs] = product.projected(readout_PD, place_P)

    def meet(self) -> None:
        """After the last product; see `Sent.meet`."""
        self._sent.meet()

    def add_waiting(self) -> None:
        """Multiply the rows of the products that had to wait.

        Raises:
            ProbeError: see `add`, or their activations have changed since.
        """
        if any(act_SI._version != version for act_SI, version in self._kept):
            raise ProbeError("expected activations that nobody writes to until the end of their layer")
        waiting, self._waiting = self._waiting, []
        for first, product, act_SI in waiting:
            self.add(first, product, act_SI)

    def rows(self, width: int) -> tuple[CalledRows, Contributions]:
        """All of them, after the last product.

        Args:
            width: I.

        Raises:
            ProbeError: experts did not run, or ran twice.
        """
        reached = sorted((pairs.start, pairs.stop) for pairs in self._reached)
        if [*(start for start, _ in reached), self._bounds[-1]] != [0, *(stop for _, stop in reached)]:
            raise ProbeError(
                f"expected each of {self._n_local} experts to run once on what was sent to it, "
                f"{self._bounds[-1]} pairs in all, got products with the pairs {reached}"
            )
        return self._pairs.rows(self._first_down), self._whole or self._filled(width)

    def _filled(self, width: int) -> Contributions:
        none = self._readout_RD.new_zeros(0, width)
        act_PI, projected_PI = (none if part is None else part for part in (self._act, self._projected))
        return Contributions(act_PI, projected_PI, self._pairs.weight_P)

    def add_biases(self, unmade_R: Tensor) -> None:
        """Add ⟨output bias, readout⟩ of the experts of each token to float64 ``[R]``."""
        for pairs, bias in self._biases:
            token_P, weight_P = self._pairs.token_P[pairs], self._pairs.weight_P[pairs]
            add_inner(unmade_R, token_P, bias, self._readout_RD[token_P] * weight_P[:, None])

"""Experts whose router tells which token comes to which of their rows: learning that it does, and following it.

Shapes: R scored tokens that meet, L down projections of this process, S rows, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mui_callback.errors import ProbeError
from mui_callback.experts.called_rows import CalledRows
from mui_callback.experts.calls import Call, activations
from mui_callback.experts.dispatch import Arrivals, Sent
from mui_callback.experts.down import Product
from mui_callback.experts.expert_parallelism import Spread
from mui_callback.experts.followed import FollowedRows
from mui_callback.experts.unrecorded import unrecorded
from mui_callback.forgiving import attempt
from mui_callback.scoring.contributions import ScoredTokens, number_among_equals
from mui_callback.scoring.rows import Contributions
from mui_callback.settings import Activation

_ROUNDING = 2**-7
"""Relative difference of two routing weights that rounding to 16 bits can explain."""


class DispatchFollower:
    """Follows the dispatch of some experts in one forward pass after another, once that was found to be right.

    Args:
        spread: which of them are in this process, and how tokens travel to them.
        where: the layer, for messages.
        n_local: L.
        first_down: number of the first of these in the layer.
    """

    def __init__(self, spread: Spread, where: str, n_local: int, first_down: int) -> None:
        self.spread = spread
        self.where = where
        self.n_local = n_local
        self.first_down = first_down
        self.is_trusted = False
        self.clear()

    def clear(self) -> None:
        """Forget the last forward pass."""
        self._announced: tuple[ScoredTokens, Tensor] | None = None
        self._rows: FollowedRows | None = None
        self._error: Exception | None = None
        if self.spread.dispatch is not None:
            self.spread.dispatch.clear()

    @property
    def is_on(self) -> bool:
        """Whether it is followed in the present forward pass."""
        return self._announced is not None

    def announce(self, tokens: ScoredTokens, readout_RD: Tensor) -> None:
        """See `Recorder.announce`."""
        if self.is_trusted:
            self._announced = (tokens, readout_RD)

    def arrive(self) -> None:
        """To be called after the router, when it is known what comes."""
        if self._announced is not None:
            tokens, readout_RD = self._announced
            with unrecorded(readout_RD.device):
                self._rows = FollowedRows(self._sent(tokens), readout_RD, self.n_local, self.first_down)

    def take(self, expert: int, product: Product, gate: Tensor | None, activation: Activation) -> None:
        """Multiply the rows of one product; what goes wrong is raised by `rows`.

        Args:
            expert: number of its first expert in the layer.
            product: the product.
            gate: activations without the up factor, where they are read.
            activation: which are wanted.
        """
        _, error = attempt(lambda: self._take(expert - self.first_down, product, gate, activation))
        self._error = self._error or error

    def meet(self) -> None:
        """After the last product; all processes make this call. What goes wrong after they have met is raised by
        `rows`."""
        if self._rows is not None:
            self._rows.meet()
            with unrecorded(self._rows.device):
                _, error = attempt(self._rows.add_waiting)
            self._error = self._error or error

    def rows(self, width: int) -> tuple[CalledRows, Contributions]:
        """All that came, after the last product; see `FollowedRows.rows`.

        Raises:
            ProbeError: the products were not those that were announced.
        """
        if self._error is not None:
            raise self._error
        return self._followed.rows(width)

    def add_biases(self, unmade_R: Tensor) -> None:
        """See `FollowedRows.add_biases`."""
        self._followed.add_biases(unmade_R)

    def learn(self, calls: Sequence[Call], tokens: ScoredTokens) -> None:
        """Trust the dispatch if it says of every row what the tail said, of rows of every expert and in all processes.

        Args:
            calls: all calls of a forward pass whose tail was asked.
            tokens: the scored tokens.
        """
        if self.spread.dispatch is not None and self.spread.dispatch.has_run:
            sent = self._sent(tokens)
            sent.meet()
            came = sent.arrivals()
            is_wrong = self._is_wrong(came, calls)
            self.spread.peers.highest(is_wrong)
            self.is_trusted = not bool(is_wrong)

    @property
    def _followed(self) -> FollowedRows:
        if self._rows is None:
            raise ProbeError(f"{self.where}: expected its router to run before its experts, as in the first batch")
        return self._rows

    def _take(self, first: int, product: Product, gate: Tensor | None, activation: Activation) -> None:
        with unrecorded(product.out.device):
            self._followed.add(first, product, activations(product, gate, activation))

    def _sent(self, tokens: ScoredTokens) -> Sent:
        """All processes make this call."""
        assert self.spread.dispatch is not None
        return self.spread.dispatch.send(tokens.number_T, self.spread.peers, self.n_local)

    def _is_wrong(self, came: Arrivals, calls: Sequence[Call]) -> Tensor:
        """How much of what is said to come is not what came, or cannot be followed; float32 scalar."""
        if not calls or any(call.product.weight is None or call.cut.weight_S is None for call in calls):
            return torch.ones((), device=came.token_N.device)
        expert_S, rank_S, token_S, weight_S = [], [], [], []
        for call in calls:
            assert call.cut.token_S is not None
            assert call.cut.weight_S is not None
            expert_S.append(call.expert_S - self.first_down)
            rank_S.append(number_among_equals(expert_S[-1]))
            token_S.append(call.cut.token_S)
            weight_S.append(call.cut.weight_S)
        expert, seen_token, seen_weight = torch.cat(expert_S), torch.cat(token_S), torch.cat(weight_S)
        token, weight = came.at(expert, torch.cat(rank_S))
        counts = (weight != 0) | (seen_weight != 0)  # neither may miss a row that the other has
        is_wrong = ((token != seen_token) & counts).sum()
        is_wrong += (((weight - seen_weight).abs() > _ROUNDING * weight.abs()) & (token >= 0)).sum()
        is_reached_L = torch.zeros(self.n_local, device=expert.device).index_add_(0, expert, (token >= 0).float())
        # of an expert that is not reached, nothing was seen of what happens to its outputs
        return (is_wrong + (is_reached_L == 0).sum()).float()

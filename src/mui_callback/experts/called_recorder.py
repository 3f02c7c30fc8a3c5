"""Reading experts where they call their down projection.

Shapes: S rows of a call (one token in one expert, or none), P rows of all calls that go to scored tokens, R scored
tokens that meet, I neurons of an expert, W = neurons of one down projection, D width of its output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mui_callback.errors import ProbeError
from mui_callback.experts.base import First
from mui_callback.experts.cut import Cut, add_inner
from mui_callback.experts.down import Product
from mui_callback.experts.gates import GateReader
from mui_callback.experts.tail import Tail
from mui_callback.scoring.contributions import ExpertScores, ScoredTokens, rank_in_token
from mui_callback.scoring.rows import Contributions
from mui_callback.settings import Activation

if TYPE_CHECKING:
    from mui_callback.experts.called import CalledExperts

_ROUNDING = 2**-7
"""Relative difference of two routing weights that rounding to 16 bits can explain."""


@dataclass(eq=False)
class _Call:
    """One product, and where the tail begins behind it."""

    product: Product
    cut: Cut
    first_expert: int
    gate: Tensor | None = None
    """Activations without the up factor, where they are read."""

    def activations(self, activation: Activation) -> Tensor:
        """``[S, W]``."""
        act = self.product.act
        if activation == "gate":
            if self.gate is None or self.gate.shape != act.shape:
                raise ProbeError(
                    "activation='gate': expected one output of the activation function of shape "
                    f"{tuple(act.shape)} before each down projection, got "
                    f"{'none' if self.gate is None else tuple(self.gate.shape)}"
                )
            act = self.gate
        return act.detach().reshape(-1, act.shape[-1])

    @property
    def expert_S(self) -> Tensor:
        if self.product.expert_S is not None:
            return self.first_expert + self.product.expert_S
        experts = torch.arange(
            self.first_expert, self.first_expert + self.product.n_experts, device=self.cut.value.device
        )
        return experts.repeat_interleave(self.cut.n_rows // self.product.n_experts)


@dataclass(frozen=True)
class _Rows:
    """The rows of all calls, one call after the other, that go to scored tokens."""

    place_P: Tensor
    token_P: Tensor
    expert_P: Tensor
    """By down projection."""
    rank_P: Tensor
    bounds: list[int]
    """Where the rows of each call begin, and where those of the last one end."""
    rows_per_token: int
    are_repeated: bool
    """Whether an expert was called for a token more than once."""

    def of_call(self, number: int, first_row: int) -> Tensor:
        """The places of the rows of one call, counted in this call."""
        return self.place_P[self.bounds[number] : self.bounds[number + 1]] - first_row


class CalledRecorder:
    """See `Recorder`."""

    def __init__(self, experts: CalledExperts, tail: Tail, first: First, activation: Activation) -> None:
        self.experts = experts
        self.gates = GateReader(experts.path, experts.activations_in) if activation == "gate" else None
        self.tail = tail
        self.first = first
        self.knows_order = False
        self.trusts_dispatch = False
        self.clear()

    def clear(self) -> None:
        """See `Recorder`."""
        self.calls: list[_Call] = []
        self.passed: list[_Call] = []
        if self.experts.spread.dispatch is not None:
            self.experts.spread.dispatch.clear()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """See `Recorder`."""
        with ExitStack() as stack:
            for module in self.experts.modules:
                stack.enter_context(module.register_forward_pre_hook(_pause))
                stack.enter_context(module.register_forward_hook(_resume))
            for module in self.experts.identities:
                stack.enter_context(module.register_forward_hook(self._pass))
            if self.experts.spread.dispatch is not None:
                stack.enter_context(self.experts.spread.dispatch.watched())
            if self.gates is not None:
                stack.enter_context(self.gates.attached())
            first = self.experts.first_down
            for down in self.experts.downs:
                stack.enter_context(down.read(partial(self._take, first)))
                first += down.n_experts
            yield

    def _take(self, first_expert: int, product: Product) -> Tensor:
        cut = self.tail.cut(product.out)
        gate = None if self.gates is None else self.gates.take()
        self.calls.append(_Call(product, cut, first_expert + product.expert, gate))
        return cut.value.clone()  # models write to the outputs of their experts in place

    def _pass(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        cut = self.tail.cut(out)
        self.passed.append(_Call(Product(out, out, None), cut, 0))
        return cut.value.clone()

    @property
    def has_run(self) -> bool:
        """See `Recorder`."""
        return bool(self.calls)

    def check_complete(self, tokens: ScoredTokens) -> None:
        """See `Recorder`."""
        if not self.calls:
            raise ProbeError(
                f"{self.tail.where} ran without calling {self.experts.path} in a way that can be read: the down "
                f"projection in {self.experts.downs[0].where} was not used, or in no linear map and no matrix product."
            )
        if self.knows_order and not self._are_positions(tokens):
            raise ProbeError(
                f"{self.tail.where}: expected {self.experts.path} to see all positions of each batch as in the first "
                "one, got another number of rows"
            )

    def _are_positions(self, tokens: ScoredTokens) -> bool:
        n_positions = tokens.n_rows * tokens.length
        return all(call.cut.n_rows == n_positions * call.product.n_experts for call in [*self.calls, *self.passed])

    @property
    def can_follow(self) -> bool:
        """See `Recorder`."""
        return self.knows_order or self.trusts_dispatch

    def follow(self, tokens: ScoredTokens) -> None:
        """See `Recorder`."""
        if self.trusts_dispatch:
            for call, (token_S, weight_S) in zip(self.calls, self._arrivals(tokens), strict=True):
                call.cut.token_S, call.cut.weight_S = token_S, weight_S
        else:
            for call in (*self.calls, *self.passed):
                call.cut.token_S, call.cut.weight_S = tokens.numbers().repeat(call.product.n_experts), None

    def learn(self, tokens: ScoredTokens) -> None:
        """See `Recorder`: shared experts see the positions as they are; a dispatch is believed if it says the same."""
        calls = [*self.calls, *self.passed]
        self.knows_order = (
            not self.experts.is_routed
            and self._are_positions(tokens)
            and all(call.cut.is_in_order(tokens) for call in calls)
        )
        self.trusts_dispatch = self._is_dispatch_right(tokens)

    def _arrivals(self, tokens: ScoredTokens) -> list[tuple[Tensor, Tensor]]:
        """Token and weight of each row of each call, as the dispatch has it."""
        spread, n_local = self.experts.spread, sum(down.n_experts for down in self.experts.downs)
        assert spread.dispatch is not None
        arrivals = spread.dispatch.arrivals(tokens.numbers(), spread.peers, n_local, self.calls[0].cut.n_rows)
        found = []
        for call in self.calls:
            local_S = call.expert_S - self.experts.first_down
            rank_S = torch.arange(len(local_S), device=local_S.device)
            if call.product.expert_S is not None:
                rank_S = rank_S - torch.searchsorted(local_S, local_S)
            found.append(arrivals.at(local_S, rank_S))
        return found

    def _is_dispatch_right(self, tokens: ScoredTokens) -> bool:
        """Whether it says of every row what the tail said, of rows of every expert and in all processes."""
        spread = self.experts.spread
        if spread.dispatch is None or self.passed or not spread.dispatch.has_run:
            return False
        n_local, device = sum(down.n_experts for down in self.experts.downs), tokens.position_R.device
        is_wrong, is_reached_L = torch.zeros((), device=device), torch.zeros(n_local, device=device)
        for call, (token_S, weight_S) in zip(self.calls, self._arrivals(tokens), strict=True):
            assert call.cut.token_S is not None
            if call.cut.weight_S is None:
                is_wrong += 1
                continue
            is_reached_L.index_add_(0, call.expert_S - self.experts.first_down, (token_S >= 0).float())
            counts_S = (weight_S != 0) | (call.cut.weight_S != 0)  # neither may miss a row that the other has
            is_wrong += ((token_S != call.cut.token_S) & counts_S).sum()
            is_wrong += ((weight_S - call.cut.weight_S).abs() > _ROUNDING * weight_S.abs())[token_S >= 0].sum()
        is_wrong += (is_reached_L == 0).sum()  # nothing was seen of what happens to the outputs of such an expert
        spread.peers.highest(is_wrong)
        return not bool(is_wrong)

    def scores(self, tokens: ScoredTokens, readout_RD: Tensor, activation: Activation) -> ExpertScores:
        """See `Recorder`."""
        first_rows = np.cumsum([0, *(call.cut.n_rows for call in self.calls)]).tolist()
        found = self._positions(tokens) if self.knows_order else self._located(first_rows)
        activations, projected, weights = [], [], []
        for number, call in enumerate(self.calls):
            place_P = found.of_call(number, first_rows[number])
            activations.append(call.activations(activation)[place_P])
            readout_PD, weight_P = call.cut.readouts_of(place_P, readout_RD)
            projected.append(call.product.projected(readout_PD, place_P))
            weights.append(weight_P)
        rows = Contributions(
            torch.cat(activations),
            torch.cat(projected),
            torch.cat([w for w in weights if w is not None]) if weights[0] is not None else None,
        )
        if found.are_repeated:
            found, rows = self._united(found, rows)
        return self._of_experts(found, rows)

    def _positions(self, tokens: ScoredTokens) -> _Rows:
        """Where each expert sees every position: nothing has to be asked of the device."""
        n_scored, device = len(tokens.position_R), tokens.position_R.device
        n_positions = tokens.n_rows * tokens.length
        n_experts = [call.product.n_experts for call in self.calls]
        first_expert = [call.first_expert for call in self.calls]
        expert_e = torch.cat(
            [torch.arange(a, a + n, device=device) for a, n in zip(first_expert, n_experts, strict=True)]
        )
        offset_e = n_positions * torch.arange(len(expert_e), device=device)
        token_R = tokens.first + torch.arange(n_scored, device=device)
        rank_e = expert_e.argsort().argsort()
        return _Rows(
            (offset_e[:, None] + tokens.position_R).flatten(),
            token_R.repeat(len(expert_e)),
            expert_e.repeat_interleave(n_scored),
            rank_e.repeat_interleave(n_scored),
            bounds=[n_scored * n for n in np.cumsum([0, *n_experts]).tolist()],
            rows_per_token=len(expert_e),
            are_repeated=False,
        )

    def _located(self, first_rows: list[int]) -> _Rows:
        tokens = [call.cut.token_S for call in self.calls]
        token_S = torch.cat([token for token in tokens if token is not None])
        is_row_S = token_S >= 0
        if self.experts.is_routed and any(call.product.n_experts > 1 for call in self.calls):
            # All experts ran on all tokens at once; those that were not chosen for a token had zeros as input.
            is_row_S &= torch.cat([(call.activations("product") != 0).any(-1) for call in self.calls])
        (place_P,) = torch.nonzero(is_row_S, as_tuple=True)
        token_P, expert_P = token_S[place_P], torch.cat([call.expert_S for call in self.calls])[place_P]
        return self._ranked(place_P, token_P, expert_P, first_rows)

    def _ranked(self, place_P: Tensor, token_P: Tensor, expert_P: Tensor, first_rows: list[int]) -> _Rows:
        rank_P, n_repeated = rank_in_token(token_P, expert_P, self.experts.n_downs)
        most = rank_P.max() if len(rank_P) else place_P.new_zeros(())
        is_mixed = self.tail.is_mixed if self.tail.is_mixed is not None else torch.zeros_like(n_repeated)
        bounds_P = torch.searchsorted(place_P, torch.tensor(first_rows, device=place_P.device))
        # one wait for the device
        *bounds, n_repeats, highest, mixed = torch.cat(
            [bounds_P, torch.stack([n_repeated, most, is_mixed.long()])]
        ).tolist()
        self.tail.raise_if_mixed(is_mixed=bool(mixed))
        return _Rows(place_P, token_P, expert_P, rank_P, bounds, highest + 1, are_repeated=n_repeats > 0)

    def _united(self, found: _Rows, rows: Contributions) -> tuple[_Rows, Contributions]:
        """One row for all calls of an expert for a token."""
        pair_P = found.token_P * self.experts.n_downs + found.expert_P
        pair_U, row_P = torch.unique(pair_P, return_inverse=True)
        score_PW = rows.act_SI.float() * rows.projected_SI.float()
        if rows.weight_S is not None:
            score_PW *= rows.weight_S[:, None]
        score_UW = score_PW.new_zeros(len(pair_U), rows.width).index_add_(0, row_P, score_PW)
        token_U, expert_U = pair_U // self.experts.n_downs, pair_U % self.experts.n_downs
        rank_U, _ = rank_in_token(token_U, expert_U, self.experts.n_downs)
        united = replace(found, token_P=token_U, expert_P=expert_U, rank_P=rank_U, rows_per_token=int(rank_U.max()) + 1)
        return united, Contributions(score_UW, torch.ones_like(score_UW))

    def _of_experts(self, found: _Rows, rows: Contributions) -> ExpertScores:
        """A row for each expert, where a down projection holds several side by side."""
        n, width = self.experts.down_width // self.experts.width, self.experts.width
        if n == 1:
            return ExpertScores(
                rows,
                found.token_P,
                self.first.expert + found.expert_P,
                first_neuron_S=self.first.neuron + found.expert_P * width,
                rank_S=found.rank_P,
                rows_per_token=found.rows_per_token,
            )
        part_n = torch.arange(n, device=rows.act_SI.device)
        expert_P = (found.expert_P[:, None] * n + part_n).flatten()
        return ExpertScores(
            Contributions(
                rows.act_SI.reshape(-1, width),
                rows.projected_SI.reshape(-1, width),
                rows.weight_S.repeat_interleave(n) if rows.weight_S is not None else None,
            ),
            found.token_P.repeat_interleave(n),
            self.first.expert + expert_P,
            first_neuron_S=self.first.neuron + expert_P * width,
            rank_S=(found.rank_P[:, None] * n + part_n).flatten(),
            rows_per_token=found.rows_per_token * n,
        )

    def add_output(self, output_R: Tensor, readout_RD: Tensor) -> None:
        """See `Recorder`."""
        for call in (*self.calls, *self.passed):
            assert call.cut.token_S is not None
            add_inner(output_R, call.cut.token_S, call.cut.value_SD, call.cut.all_readouts(readout_RD))

    def add_unmade(self, unmade_R: Tensor, tokens: ScoredTokens, readout_RD: Tensor) -> None:
        """See `Recorder`."""
        for call in self.calls:
            assert call.cut.token_S is not None
            if call.product.bias is not None:
                add_inner(unmade_R, call.cut.token_S, call.product.bias, call.cut.all_readouts(readout_RD))
        for call in self.passed:
            assert call.cut.token_S is not None
            add_inner(unmade_R, call.cut.token_S, call.cut.value_SD, call.cut.all_readouts(readout_RD))


def _pause(module: nn.Module, args: Any) -> None:
    torch.set_grad_enabled(False)


def _resume(module: nn.Module, args: Any, out: Any) -> None:
    torch.set_grad_enabled(True)

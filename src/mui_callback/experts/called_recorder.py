"""Reading experts where they call their down projection.

Shapes: S rows of a call (one token in one expert, or none), P rows of all calls that go to scored tokens, R scored
tokens that meet, I neurons of an expert, W = neurons of one down projection, D width of its output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mui_callback.errors import ProbeError
from mui_callback.experts.base import First
from mui_callback.experts.called_rows import CalledRows
from mui_callback.experts.cut import Cut, add_inner
from mui_callback.experts.dispatch import Arrivals
from mui_callback.experts.down import Product
from mui_callback.experts.followed import FollowedRows
from mui_callback.experts.gates import GateReader
from mui_callback.experts.tail import Tail
from mui_callback.forgiving import attempt
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

    @property
    def expert_S(self) -> Tensor:
        if self.product.expert_S is not None:
            return self.first_expert + self.product.expert_S
        experts = torch.arange(
            self.first_expert, self.first_expert + self.product.n_experts, device=self.cut.value.device
        )
        return experts.repeat_interleave(self.cut.n_rows // self.product.n_experts)


@dataclass(frozen=True)
class _Located:
    """The rows of all calls, one call after the other, that go to scored tokens."""

    rows: CalledRows
    place_P: Tensor
    bounds: list[int]
    """Where the rows of each call begin, and where those of the last one end."""

    def of_call(self, number: int, first_row: int) -> Tensor:
        """The places of the rows of one call, counted in this call."""
        return self.place_P[self.bounds[number] : self.bounds[number + 1]] - first_row


class CalledRecorder:
    """See `Recorder`."""

    def __init__(self, experts: CalledExperts, tail: Tail, first: First, activation: Activation) -> None:
        self.experts = experts
        self.activation = activation
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
        self.announced: tuple[ScoredTokens, Tensor] | None = None
        """Scored tokens and the unembedding rows of their targets, in a forward pass whose dispatch is followed."""
        self.followed: FollowedRows | None = None
        self.error: Exception | None = None
        self._was_recording: list[bool] = []
        if self.experts.spread.dispatch is not None:
            self.experts.spread.dispatch.clear()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """See `Recorder`."""
        with ExitStack() as stack:
            for module in self.experts.modules:
                stack.enter_context(module.register_forward_pre_hook(self._pause))
                stack.enter_context(module.register_forward_hook(self._resume))
            for module in self.experts.identities:
                stack.enter_context(module.register_forward_hook(self._pass))
            if self.experts.spread.dispatch is not None:
                stack.enter_context(self.experts.spread.dispatch.watched(self._arrive))
            if self.gates is not None:
                stack.enter_context(self.gates.attached())
            first = self.experts.first_down
            for down in self.experts.downs:
                stack.enter_context(down.read(partial(self._take, first), lambda: not self.is_followed))
                first += down.n_experts
            yield

    def announce(self, tokens: ScoredTokens, readout_RD: Tensor) -> None:
        """See `Recorder`."""
        if self.trusts_dispatch:
            self.announced = (tokens, readout_RD)

    @property
    def is_followed(self) -> bool:
        """See `Recorder`."""
        return self.announced is not None

    def _arrive(self) -> None:
        """After the router, when it is known what comes."""
        if self.announced is not None:
            tokens, readout_RD = self.announced
            with torch.no_grad(), torch.autocast(readout_RD.device.type, enabled=False):
                came = self._arrivals(tokens)
                self.followed = FollowedRows(came, readout_RD, self._n_local, self.experts.first_down)

    def _take(self, first_expert: int, product: Product) -> Tensor:
        gate = None if self.gates is None else self.gates.take()
        if self.is_followed:
            first = first_expert + product.expert - self.experts.first_down
            _, error = attempt(lambda: self._follow(first, product, gate))
            self.error = self.error or error
            return product.out
        cut = self.tail.cut(product.out)
        self.calls.append(_Call(product, cut, first_expert + product.expert, gate))
        return cut.value.clone()  # models write to the outputs of their experts in place

    def _follow(self, first: int, product: Product, gate: Tensor | None) -> None:
        if self.followed is None:
            raise ProbeError(f"{self.tail.where}: expected its router to run before its experts, as in the first batch")
        act_SI = activations(product, gate, self.activation)
        with torch.no_grad(), torch.autocast(act_SI.device.type, enabled=False):
            self.followed.add(first, product, act_SI)

    def _pass(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        cut = self.tail.cut(out)
        self.passed.append(_Call(Product(out, out, None), cut, 0))
        return cut.value.clone()

    @property
    def has_run(self) -> bool:
        """See `Recorder`."""
        return bool(self.calls) or self.is_followed

    def check_complete(self, tokens: ScoredTokens) -> None:
        """See `Recorder`."""
        if not self.has_run:
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

    def follow(self, tokens: ScoredTokens) -> None:
        """See `Recorder`."""
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

    @property
    def _n_local(self) -> int:
        return sum(down.n_experts for down in self.experts.downs)

    def _arrivals(self, tokens: ScoredTokens) -> Arrivals:
        """What comes to the experts of this process, as the dispatch has it."""
        spread = self.experts.spread
        assert spread.dispatch is not None
        return spread.dispatch.arrivals(tokens.numbers(), spread.peers, self._n_local)

    def _is_dispatch_right(self, tokens: ScoredTokens) -> bool:
        """Whether it says of every row what the tail said, of rows of every expert and in all processes."""
        spread = self.experts.spread
        if spread.dispatch is None or self.passed or not spread.dispatch.has_run:
            return False
        came = self._arrivals(tokens)
        is_wrong = self._is_wrong(came) if self._can_be_followed else torch.ones((), device=tokens.position_R.device)
        spread.peers.highest(is_wrong)
        return not bool(is_wrong)

    @property
    def _can_be_followed(self) -> bool:
        """Whether all calls are plain products, and the tail told what it multiplies their rows with."""
        return all(call.product.weight is not None and call.cut.weight_S is not None for call in self.calls)

    def _is_wrong(self, came: Arrivals) -> Tensor:
        """How much of what is said to come is not what came; float32 scalar."""
        local_S, rank_S, token_S, weight_S = [], [], [], []
        for call in self.calls:
            assert call.cut.token_S is not None
            assert call.cut.weight_S is not None
            token_S.append(call.cut.token_S)
            weight_S.append(call.cut.weight_S)
            expert_S = call.expert_S - self.experts.first_down
            local_S.append(expert_S)
            rank_S.append(torch.arange(len(expert_S), device=expert_S.device) - torch.searchsorted(expert_S, expert_S))
        local, seen_token, seen_weight = torch.cat(local_S), torch.cat(token_S), torch.cat(weight_S)
        token, weight = came.at(local, torch.cat(rank_S))
        counts = (weight != 0) | (seen_weight != 0)  # neither may miss a row that the other has
        is_wrong = ((token != seen_token) & counts).sum()
        is_wrong += (((weight - seen_weight).abs() > _ROUNDING * weight.abs()) & (token >= 0)).sum()
        is_reached_L = torch.zeros(self._n_local, device=local.device).index_add_(0, local, (token >= 0).float())
        # of an expert that is not reached, nothing was seen of what happens to its outputs
        return (is_wrong + (is_reached_L == 0).sum()).float()

    def scores(self, tokens: ScoredTokens, readout_RD: Tensor, activation: Activation) -> ExpertScores:
        """See `Recorder`."""
        if self.is_followed:
            rows, contributions = self._followed_rows()
        else:
            rows, contributions = self._called_rows(tokens, readout_RD, activation)
        return rows.scores(
            contributions,
            self.first,
            n_downs=self.experts.n_downs,
            experts_of_down=self.experts.down_width // self.experts.width,
        )

    def _followed_rows(self) -> tuple[CalledRows, Contributions]:
        if self.error is not None:
            raise self.error
        if self.followed is None:
            raise ProbeError(f"{self.tail.where}: expected its router to run in every batch, as in the first one")
        return self.followed.rows(self.experts.down_width)

    def _called_rows(
        self, tokens: ScoredTokens, readout_RD: Tensor, activation: Activation
    ) -> tuple[CalledRows, Contributions]:
        first_rows = np.cumsum([0, *(call.cut.n_rows for call in self.calls)]).tolist()
        found = self._positions(tokens) if self.knows_order else self._located(first_rows)
        act, projected, weights = [], [], []
        for number, call in enumerate(self.calls):
            place_P = found.of_call(number, first_rows[number])
            act.append(activations(call.product, call.gate, activation)[place_P])
            readout_PD, weight_P = call.cut.readouts_of(place_P, readout_RD)
            projected.append(call.product.projected(readout_PD, place_P))
            weights.append(weight_P)
        weight = torch.cat([w for w in weights if w is not None]) if weights[0] is not None else None
        return found.rows, Contributions(torch.cat(act), torch.cat(projected), weight)

    def _positions(self, tokens: ScoredTokens) -> _Located:
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
        return _Located(
            CalledRows(
                token_R.repeat(len(expert_e)),
                expert_e.repeat_interleave(n_scored),
                rank_e.repeat_interleave(n_scored),
                rows_per_token=len(expert_e),
            ),
            (offset_e[:, None] + tokens.position_R).flatten(),
            bounds=[n_scored * n for n in np.cumsum([0, *n_experts]).tolist()],
        )

    def _located(self, first_rows: list[int]) -> _Located:
        tokens = [call.cut.token_S for call in self.calls]
        token_S = torch.cat([token for token in tokens if token is not None])
        is_row_S = token_S >= 0
        if self.experts.is_routed and any(call.product.n_experts > 1 for call in self.calls):
            # All experts ran on all tokens at once; those that were not chosen for a token had zeros as input.
            is_row_S &= torch.cat([(activations(call.product, None, "product") != 0).any(-1) for call in self.calls])
        (place_P,) = torch.nonzero(is_row_S, as_tuple=True)
        token_P, expert_P = token_S[place_P], torch.cat([call.expert_S for call in self.calls])[place_P]
        return self._ranked(place_P, token_P, expert_P, first_rows)

    def _ranked(self, place_P: Tensor, token_P: Tensor, expert_P: Tensor, first_rows: list[int]) -> _Located:
        rank_P, n_repeated = rank_in_token(token_P, expert_P, self.experts.n_downs)
        most = rank_P.max() if len(rank_P) else place_P.new_zeros(())
        is_mixed = self.tail.is_mixed if self.tail.is_mixed is not None else torch.zeros_like(n_repeated)
        bounds_P = torch.searchsorted(place_P, torch.tensor(first_rows, device=place_P.device))
        # one wait for the device
        *bounds, n_repeats, highest, mixed = torch.cat(
            [bounds_P, torch.stack([n_repeated, most, is_mixed.long()])]
        ).tolist()
        self.tail.raise_if_mixed(is_mixed=bool(mixed))
        rows = CalledRows(token_P, expert_P, rank_P, highest + 1, are_repeated=n_repeats > 0)
        return _Located(rows, place_P, bounds)

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

    def _pause(self, module: nn.Module, args: Any) -> None:
        self._was_recording.append(torch.is_grad_enabled())
        torch.set_grad_enabled(False)

    def _resume(self, module: nn.Module, args: Any, out: Any) -> None:
        was_recording = self._was_recording.pop()
        torch.set_grad_enabled(was_recording or not self.is_followed)


def activations(product: Product, gate: Tensor | None, activation: Activation) -> Tensor:
    """Those that feed a down projection, or what they are without the up factor, ``[S, W]``."""
    act = product.act
    if activation == "gate":
        if gate is None or gate.shape != act.shape:
            raise ProbeError(
                "activation='gate': expected one output of the activation function of shape "
                f"{tuple(act.shape)} before each down projection, got {'none' if gate is None else tuple(gate.shape)}"
            )
        act = gate
    return act.detach().reshape(-1, act.shape[-1])

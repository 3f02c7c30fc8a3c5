"""Reading experts where they call their down projection.

Shapes: S rows of a call (one token in one expert, or none), P rows of all calls that go to scored tokens, R scored
tokens that meet, I neurons of an expert, W = neurons of one down projection, D width of its output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mui_callback.errors import ProbeError
from mui_callback.experts.base import First
from mui_callback.experts.called_rows import CalledRows
from mui_callback.experts.calls import Call, activations
from mui_callback.experts.cut import Cut, add_inner
from mui_callback.experts.direct import DirectRows
from mui_callback.experts.down import Product
from mui_callback.experts.follower import DispatchFollower
from mui_callback.experts.gates import GateReader
from mui_callback.experts.located import at_positions, at_tokens
from mui_callback.experts.tail import Tail
from mui_callback.experts.unrecorded import unrecorded
from mui_callback.forgiving import attempt
from mui_callback.scoring.contributions import ExpertScores, ScoredTokens
from mui_callback.scoring.rows import Contributions, joined, rows_at
from mui_callback.settings import Activation

if TYPE_CHECKING:
    from mui_callback.experts.called import CalledExperts


class CalledRecorder:
    """See `Recorder`."""

    def __init__(self, experts: CalledExperts, tail: Tail, first: First, activation: Activation) -> None:
        self.experts = experts
        self.activation = activation
        self.gates = GateReader(experts.path, experts.activations_in) if activation == "gate" else None
        self.tail = tail
        self.first = first
        n_local = sum(down.n_experts for down in experts.downs)
        self.follower = DispatchFollower(experts.spread, tail.where, n_local, experts.first_down)
        self.knows_order = False
        self.is_direct = False
        self.clear()

    def clear(self) -> None:
        """See `Recorder`."""
        self.calls: list[Call] = []
        self.passed: list[Call] = []
        self.follower.clear()
        self.direct: DirectRows | None = None
        self._error: Exception | None = None
        self._was_recording: list[bool] = []

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
                stack.enter_context(self.experts.spread.dispatch.watched(self.follower.arrive))
            if self.gates is not None:
                stack.enter_context(self.gates.attached())
            first = self.experts.first_down
            for down in self.experts.downs:
                stack.enter_context(down.read(partial(self._take, first), lambda: not self.is_followed))
                first += down.n_experts
            yield

    def announce(self, tokens: ScoredTokens, readout_RD: Tensor) -> None:
        """See `Recorder`."""
        self.follower.announce(tokens, readout_RD)
        if self.is_direct:
            self.direct = DirectRows(tokens, readout_RD)

    @property
    def is_followed(self) -> bool:
        """See `Recorder`."""
        return self.follower.is_on or self.direct is not None

    @property
    def trusts_dispatch(self) -> bool:
        """See `Recorder`."""
        return self.follower.is_trusted

    def _take(self, first: int, product: Product) -> Tensor:
        gate = None if self.gates is None else self.gates.take()
        if self.direct is not None:
            _, error = attempt(partial(self._add, self.direct, first + product.expert, product, gate))
            self._error = self._error or error
            return product.out
        if self.is_followed:
            self.follower.take(first + product.expert, product, gate, self.activation)
            return product.out
        cut = self.tail.cut(product.out)
        self.calls.append(Call(product, cut, first + product.expert, gate))
        return cut.value.clone()  # models write to the outputs of their experts in place

    def _add(self, direct: DirectRows, expert: int, product: Product, gate: Tensor | None) -> None:
        with unrecorded(product.out.device):
            direct.add(expert, product, activations(product, gate, self.activation))

    def _pass(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        cut = self.tail.cut(out)
        self.passed.append(Call(Product(out, out, None), cut, 0))
        return cut.value.clone()

    @property
    def has_run(self) -> bool:
        """See `Recorder`."""
        return bool(self.calls) or self.follower.is_on or (self.direct is not None and self.direct.have_come)

    def check_complete(self, tokens: ScoredTokens) -> None:
        """See `Recorder`."""
        if self._error is not None:
            raise self._error
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

    def meet(self) -> None:
        """See `Recorder`."""
        self.follower.meet()

    def follow(self, tokens: ScoredTokens) -> None:
        """See `Recorder`."""
        number_T = tokens.number_T
        for call in (*self.calls, *self.passed):
            n = call.product.n_experts
            call.cut.token_S, call.cut.weight_S = number_T if n == 1 else number_T.repeat(n), None

    def learn(self, tokens: ScoredTokens) -> None:
        """See `Recorder`: shared experts see the positions as they are; a dispatch is believed if it says the same."""
        calls = [*self.calls, *self.passed]
        self.knows_order = (
            not self.experts.is_routed
            and self._are_positions(tokens)
            and all(call.cut.is_in_order(tokens) for call in calls)
        )
        if not self.passed:
            self.follower.learn(self.calls, tokens)

    @property
    def cuts(self) -> list[Cut]:
        """See `Recorder`."""
        return [call.cut for call in (*self.calls, *self.passed)]

    @property
    def can_be_direct(self) -> bool:
        """See `Recorder`."""
        are_plain = all(call.product.weight is not None and call.product.n_experts == 1 for call in self.calls)
        return self.knows_order and not self.passed and are_plain

    def scores(self, tokens: ScoredTokens, readout_RD: Tensor, activation: Activation) -> ExpertScores:
        """See `Recorder`."""
        if self.direct is not None:
            rows, contributions = self.direct.rows()
        elif self.is_followed:
            rows, contributions = self.follower.rows(self.experts.down_width)
        else:
            rows, contributions = self._called_rows(tokens, readout_RD, activation)
        return rows.scores(
            contributions,
            self.first,
            n_downs=self.experts.n_downs,
            experts_of_down=self.experts.down_width // self.experts.width,
        )

    def _called_rows(
        self, tokens: ScoredTokens, readout_RD: Tensor, activation: Activation
    ) -> tuple[CalledRows, Contributions]:
        first_rows = np.cumsum([0, *(call.cut.n_rows for call in self.calls)]).tolist()
        if self.knows_order:
            found = at_positions(self.calls, tokens)
        else:
            found = at_tokens(
                *(self.calls, first_rows, self.tail),
                n_tokens=tokens.n_numbers,
                n_downs=self.experts.n_downs,
                is_routed=self.experts.is_routed,
            )
        act, projected, weights = [], [], []
        for number, call in enumerate(self.calls):
            place_P = found.of_call(number, first_rows[number])
            act.append(rows_at(activations(call.product, call.gate, activation), place_P))
            readout_PD, weight_P = call.cut.readouts_of(place_P, readout_RD)
            projected.append(call.product.projected(readout_PD, place_P))
            weights.append(weight_P)
        weight = torch.cat([w for w in weights if w is not None]) if weights[0] is not None else None
        return found.rows, Contributions(joined(act), joined(projected), weight)

    def add_output(self, output_R: Tensor, readout_RD: Tensor) -> None:
        """See `Recorder`."""
        for call in (*self.calls, *self.passed):
            assert call.cut.token_S is not None
            add_inner(output_R, call.cut.token_S, call.cut.value_SD, call.cut.all_readouts(readout_RD))

    def add_unmade(self, unmade_R: Tensor, tokens: ScoredTokens, readout_RD: Tensor) -> None:
        """See `Recorder`."""
        if self.direct is not None:
            self.direct.add_biases(unmade_R)
        elif self.is_followed:
            self.follower.add_biases(unmade_R)
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

"""Experts that are read where they call their down projection.

Lists of modules, weights that are stacked outside of transformers' experts interface, shared experts and the MLP of a
dense layer: whatever calls them, and in which order, the activations are the input of the down projection, and what
becomes of its output is the tail.

Shapes: S rows (one token in one expert), R scored tokens, I neurons of an expert, W = neurons of one down projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mui_callback.errors import ProbeError, UnsupportedModelError
from mui_callback.experts.down import DownProjection, Product, StackedDown
from mui_callback.experts.expert_parallelism import NOT_SPREAD, Spread
from mui_callback.experts.tail import Cut, Tail, add_inner
from mui_callback.scoring.contributions import ExpertScores, ScoredTokens, contributions, only_finite


class CalledExperts:
    """Experts by their down projections.

    Args:
        path: module path, for messages.
        downs: the down projections, in the order of the experts.
        modules: the modules in which experts run up to their down projection.
        is_routed: whether tokens are sent to them; if not, every position passes through each of them, in order.
        width: neurons that make an expert, where a down projection holds several side by side.
        identities: modules beside the experts that pass tokens on as they are ("zero experts").
        spread: which experts of the layer these are, where each process has some.

    Raises:
        UnsupportedModelError: the experts have different widths.
    """

    def __init__(
        self,
        path: str,
        downs: Sequence[DownProjection],
        modules: Sequence[nn.Module],
        *,
        is_routed: bool,
        width: int | None = None,
        identities: Sequence[nn.Module] = (),
        spread: Spread = NOT_SPREAD,
    ) -> None:
        self.path = path
        self.downs = tuple(downs)
        self.modules = tuple(modules)
        self.is_routed = is_routed
        self.identities = tuple(identities)
        self.spread = spread
        down_widths = {down.width for down in downs}
        if len(down_widths) != 1:
            raise UnsupportedModelError(
                f"{path}: expected experts of one width, got {', '.join(map(str, sorted(down_widths)))}"
            )
        self.down_width = down_widths.pop()
        self.width = width if width and self.down_width % width == 0 else self.down_width
        n_local = sum(down.n_experts for down in self.downs)
        self.n_downs = spread.total(n_local)
        self.first_down = spread.first(n_local)

    @property
    def layout(self) -> str:
        """See `Experts`."""
        if any(isinstance(down, StackedDown) for down in self.downs):
            return "one parameter"
        return "list of modules" if len(self.downs) > 1 else "MLP"

    @property
    def n_experts(self) -> int:
        """See `Experts`."""
        return self.n_downs * (self.down_width // self.width)

    def recorder(self, tail: Tail, first_neuron: int) -> CalledRecorder:
        """See `Experts`."""
        return CalledRecorder(self, tail, first_neuron)


@dataclass(eq=False)
class _Call:
    """One product, and where the tail begins behind it."""

    product: Product
    cut: Cut
    first_expert: int
    token_S: Tensor | None = None
    """Number of the scored token of each row, int64 ``[S]``; -1 where there is none."""

    @property
    def act_SW(self) -> Tensor:
        return self.product.act.detach().reshape(-1, self.product.act.shape[-1])

    @property
    def expert_S(self) -> Tensor:
        if self.product.expert_S is not None:
            return self.first_expert + self.product.expert_S
        n_rows, device = self.cut.value_SD.shape[0], self.cut.value.device
        experts = torch.arange(self.first_expert, self.first_expert + self.product.n_experts, device=device)
        return experts.repeat_interleave(n_rows // self.product.n_experts)


class CalledRecorder:
    """See `Recorder`."""

    def __init__(self, experts: CalledExperts, tail: Tail, first_neuron: int) -> None:
        self.experts = experts
        self.tail = tail
        self.first_neuron = first_neuron
        self.is_in_order = False
        self.clear()

    def clear(self) -> None:
        """See `Recorder`."""
        self.calls: list[_Call] = []
        self.passed: list[_Call] = []

    @contextmanager
    def attached(self) -> Iterator[None]:
        """See `Recorder`."""
        with ExitStack() as stack:
            for module in self.experts.modules:
                stack.enter_context(module.register_forward_pre_hook(_pause))
                stack.enter_context(module.register_forward_hook(_resume))
            for module in self.experts.identities:
                stack.enter_context(module.register_forward_hook(self._pass))
            first = self.experts.first_down
            for down in self.experts.downs:
                stack.enter_context(down.read(partial(self._take, first)))
                first += down.n_experts
            yield

    def _take(self, first_expert: int, product: Product) -> Tensor:
        cut = self.tail.cut(product.out)
        self.calls.append(_Call(product, cut, first_expert + product.expert))
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

    def locate(self, out: Tensor, tokens: ScoredTokens, *, check: bool) -> None:
        """See `Recorder`."""
        calls = [*self.calls, *self.passed]
        n_positions = tokens.n_rows * tokens.length
        is_whole = all(len(call.act_SW) == n_positions * call.product.n_experts for call in calls)
        if check:
            cuts = [call.cut for call in calls]
            self.is_in_order = not self.experts.is_routed and is_whole and self.tail.is_in_order(out, cuts, tokens)
        if self.is_in_order and is_whole:
            for call in calls:
                call.token_S = tokens.numbers().repeat(call.product.n_experts)
            return
        for call, token_S in zip(calls, self.tail.tokens_of(out, [call.cut for call in calls], tokens), strict=True):
            call.token_S = token_S

    def scores(self, tokens: ScoredTokens) -> ExpertScores:
        """See `Recorder`."""
        seen = torch.autograd.grad(
            [call.product.out for call in self.calls],
            [call.product.act for call in self.calls],
            [call.cut.readout for call in self.calls],
        )
        parts = [self._rows(call, grad) for call, grad in zip(self.calls, seen, strict=True)]
        score_SW = torch.cat([score for score, _, _ in parts])
        token_S, expert_S = torch.cat([token for _, token, _ in parts]), torch.cat([expert for _, _, expert in parts])
        # An expert may be called for a token more than once: one row for both.
        place_S, row_S = torch.unique(token_S * self.experts.n_downs + expert_S, return_inverse=True)
        score_SW = score_SW.new_zeros(len(place_S), score_SW.shape[1]).index_add_(0, row_S, score_SW)
        score_SW, n_not_finite = only_finite(score_SW)
        token_S, expert_S = place_S // self.experts.n_downs, place_S % self.experts.n_downs
        rank_S = torch.arange(len(token_S), device=token_S.device) - torch.searchsorted(token_S, token_S)
        return ExpertScores(
            score_SW,
            token_S,
            first_neuron_S=self.first_neuron + expert_S * self.experts.down_width,
            rank_S=rank_S,
            rows_per_token=int(rank_S.max()) + 1 if len(rank_S) else 1,
            expert_width=self.experts.width,
            n_not_finite=n_not_finite,
        )

    def _rows(self, call: _Call, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Contributions, tokens and experts of the rows of a call that belong to scored tokens."""
        assert call.token_S is not None
        act_SW = call.act_SW
        is_row_S = call.token_S >= 0
        if self.experts.is_routed and call.product.n_experts > 1:
            # All experts ran on all tokens at once; those that were not chosen for a token had zeros as input.
            is_row_S &= (act_SW != 0).any(-1)
        score_SW = contributions(act_SW[is_row_S], grad.reshape(act_SW.shape)[is_row_S])
        return score_SW, call.token_S[is_row_S], call.expert_S[is_row_S]

    def add_output(self, output_R: Tensor, tokens: ScoredTokens) -> None:
        """See `Recorder`."""
        for call in (*self.calls, *self.passed):
            assert call.token_S is not None
            add_inner(output_R, call.token_S, call.cut.value_SD, call.cut.readout_SD)

    def add_unmade(self, unmade_R: Tensor, tokens: ScoredTokens) -> None:
        """See `Recorder`."""
        for call in self.calls:
            assert call.token_S is not None
            if call.product.bias is not None:
                add_inner(unmade_R, call.token_S, call.product.bias, call.cut.readout_SD)
        for call in self.passed:
            assert call.token_S is not None
            add_inner(unmade_R, call.token_S, call.cut.value_SD, call.cut.readout_SD)


def _pause(module: nn.Module, args: Any) -> None:
    torch.set_grad_enabled(False)


def _resume(module: nn.Module, args: Any, out: Any) -> None:
    torch.set_grad_enabled(True)

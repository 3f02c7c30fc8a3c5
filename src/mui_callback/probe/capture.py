"""Reading the expert layers while the model runs, one layer at a time.

`instrument` puts hooks on the layers and its own experts function behind transformers' experts interface. When the
last expert of a layer has run, the layer's contributions are computed and handed on, and nothing of it is kept.

What lies between an expert's output and the output of its MoE layer (a gate on the shared expert, a scaling
factor, a projection out of a latent space) is linear in that output. Its transpose, applied to the unembedding row
of the target, gives the readout in front of it. Autograd knows that transpose for any architecture, so the few
operations of this tail are recorded, and nothing else is.

Shapes: T positions of the batch (flattened), K experts of a token, R scored tokens, S = R·K rows, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mui_callback.errors import ProbeError
from mui_callback.experts.discover import ExpertLayer
from mui_callback.experts.interface import route_experts_through
from mui_callback.experts.shared import SharedExperts
from mui_callback.experts.stacked import RoutedRows
from mui_callback.scoring.contributions import ExpertScores, LayerScores, ScoredTokens, contributions

LayerConsumer = Callable[[int, LayerScores], None]
"""Takes the position of a layer and its contributions to one batch."""


class Reading:
    """What is measured right now: the scored tokens of the batch and their unembedding rows."""

    def __init__(self, consume: LayerConsumer, *, with_output: bool = False) -> None:
        self.consume = consume
        self.with_output = with_output
        self.tokens: ScoredTokens | None = None
        self._readout_TD: Tensor | None = None

    @contextmanager
    def batch(self, tokens: ScoredTokens, readout_RD: Tensor) -> Iterator[None]:
        """Layers that run inside are read; `readout_RD` are the unembedding rows of the targets."""
        readout_TD = readout_RD.new_zeros(tokens.n_rows * tokens.length, readout_RD.shape[1])
        readout_TD[tokens.position_R] = readout_RD
        self.tokens, self._readout_TD = tokens, readout_TD
        try:
            yield
        finally:
            self.tokens = self._readout_TD = None

    @property
    def readout_TD(self) -> Tensor:
        """Unembedding row of the token that each position predicts, zero where none is scored."""
        assert self._readout_TD is not None
        return self._readout_TD


@contextmanager
def instrument(layers: tuple[ExpertLayer, ...], reading: Reading) -> Iterator[None]:
    """Hooks on all layers while it lasts; to be entered under `torch.no_grad`."""
    captures = [_LayerCapture(index, layer, reading) for index, layer in enumerate(layers)]
    with ExitStack() as stack:
        stack.enter_context(
            route_experts_through({capture.layer.routed.module: capture.run_routed for capture in captures})
        )
        for capture in captures:
            stack.enter_context(capture.hooked())
        yield


class _LayerCapture:
    """Collects what one layer's experts did, from the begin to the end of the layer's scope."""

    def __init__(self, index: int, layer: ExpertLayer, reading: Reading) -> None:
        self.index = index
        self.layer = layer
        self.reading = reading
        self.shared_act: dict[str, Tensor] = {}
        self.shared_out: dict[str, Tensor] = {}
        self._forget()

    def _forget(self) -> None:
        self.rows: RoutedRows | None = None
        self.routed_out: Tensor | None = None
        self.shared_act.clear()
        self.shared_out.clear()

    @contextmanager
    def hooked(self) -> Iterator[None]:
        scope = self.layer.scope
        handles = [scope.register_forward_pre_hook(self._before), scope.register_forward_hook(self._after)]
        for shared in self.layer.shared:
            handles += self._hook_shared(shared)
        if self.layer.scope_is_moe:
            norms = [child for child in scope.children() if "norm" in type(child).__name__.lower()]
            handles += [norm.register_forward_hook(_hold_scale) for norm in norms]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._forget()

    # While the scope runs, in this order.

    def _before(self, scope: nn.Module, args: Any) -> None:
        self._forget()

    def run_routed(self, x: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Stands in for the forward of the routed experts."""
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            out, self.rows = self.layer.routed.run(x, expert_TK, weight_TK)
        self.routed_out = self._leaf(out)
        return self.routed_out

    def _hook_shared(self, shared: SharedExperts) -> list[RemovableHandle]:
        def before(module: nn.Module, args: Any) -> None:
            self._record_tail(False)

        def after(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            self.shared_out[shared.path] = self._leaf(out)
            return self.shared_out[shared.path]

        return [
            shared.module.register_forward_pre_hook(before),
            *shared.watch(partial(self.shared_act.__setitem__, shared.path)),
            shared.module.register_forward_hook(after),
        ]

    def _after(self, scope: nn.Module, args: Any, out: Any) -> Any:
        self._record_tail(False)
        if self.reading.tokens is not None:
            self._score(out[0] if isinstance(out, tuple) else out, self.reading.tokens)
        self._forget()
        if isinstance(out, tuple):
            return tuple(part.detach() if isinstance(part, Tensor) else part for part in out)
        return out.detach()

    def _record_tail(self, on: bool) -> None:
        if self.layer.scope_is_moe:
            torch.set_grad_enabled(on)

    def _leaf(self, out: Tensor) -> Tensor:
        """The output of an expert, from which on the tail is recorded."""
        self._record_tail(True)
        return out.detach().requires_grad_() if self.layer.scope_is_moe else out

    # At the end of the scope.

    def _score(self, out: Tensor, tokens: ScoredTokens) -> None:
        self._check_complete(tokens)
        routed_readout_RD, shared_readouts_RD = self._readouts(out, tokens)
        with torch.autocast(out.device.type, enabled=False):
            parts = [self._score_routed(routed_readout_RD, tokens)]
            first = self.layer.shape.n_routed * self.layer.shape.routed_width
            for shared, readout_RD in zip(self.layer.shared, shared_readouts_RD, strict=True):
                parts.append(self._score_shared(shared, readout_RD, first, tokens))
                first += shared.width
            output_R = bias_R = None
            if self.reading.with_output:
                output_R = self._output(out, tokens)
                bias_R = self._bias(routed_readout_RD, shared_readouts_RD, tokens)
        self.reading.consume(self.index, LayerScores(tuple(parts), output_R, bias_R))

    def _check_complete(self, tokens: ScoredTokens) -> None:
        where = f"layer {self.layer.shape.layer} ({self.layer.shape.path})"
        if self.rows is None:
            raise ProbeError(
                f"{where} ran without calling its experts through transformers' experts interface. "
                "Was its forward replaced, by a kernel from the hub for example?"
            )
        expected = tokens.n_rows * tokens.length
        if self.rows.expert_TK.shape[0] != expected:
            raise ProbeError(
                f"{where}: expected its experts to see the {expected} positions of the batch, one row each, "
                f"got {self.rows.expert_TK.shape[0]}."
            )
        for shared in self.layer.shared:
            if shared.path not in self.shared_out or shared.path not in self.shared_act:
                raise ProbeError(f"{where} ran without calling its shared experts {shared.path}.")

    def _readouts(self, out: Tensor, tokens: ScoredTokens) -> tuple[Tensor, list[Tensor]]:
        """The unembedding rows as seen from the output of the routed and of each shared expert, ``[R, D]`` each."""
        readout_TD = self.reading.readout_TD
        if not self.layer.scope_is_moe:
            readout_RD = readout_TD[tokens.position_R]
            return readout_RD, [readout_RD] * len(self.layer.shared)
        assert self.routed_out is not None
        leaves = [self.routed_out, *(self.shared_out[shared.path] for shared in self.layer.shared)]
        seen = torch.autograd.grad(out, leaves, readout_TD.to(out.dtype).view_as(out))
        rows = [leaf.reshape(-1, leaf.shape[-1])[tokens.position_R] for leaf in seen]
        return rows[0], rows[1:]

    def _score_routed(self, readout_RD: Tensor, tokens: ScoredTokens) -> ExpertScores:
        assert self.rows is not None
        rows, routed = self.rows, self.layer.routed
        expert_RK, by_expert_RK = rows.expert_TK[tokens.position_R].sort(dim=1)
        weight_RK = rows.weight_TK[tokens.position_R].gather(1, by_expert_RK)
        row_RK = rows.row_TK[tokens.position_R].gather(1, by_expert_RK)
        top_k = expert_RK.shape[1]

        expert_S, order_S = expert_RK.flatten().sort(stable=True)
        token_S, rank_S = order_S // top_k, order_S % top_k
        row_S = row_RK.flatten()[order_S]
        is_row_S = expert_S < routed.n_experts
        expert_S = expert_S.clamp(max=routed.n_experts - 1)
        readout_SD = readout_RD[token_S]
        if rows.raw_SD is not None:
            readout_SD = routed.through_norm(readout_SD, rows.raw_SD[row_S])
        score_SI = contributions(rows.act_SI[row_S], routed.project(readout_SD, expert_S), weight_RK.flatten()[order_S])
        return ExpertScores(score_SI, token_S, expert_S * routed.width, rank_S, top_k, routed.width, is_row_S)

    def _score_shared(
        self, shared: SharedExperts, readout_RD: Tensor, first: int, tokens: ScoredTokens
    ) -> ExpertScores:
        score_RW = contributions(self.shared_act[shared.path][tokens.position_R], shared.project(readout_RD))
        token_R = torch.arange(score_RW.shape[0], device=score_RW.device)
        zero_R = torch.zeros_like(token_R)
        return ExpertScores(score_RW, token_R, zero_R + first, zero_R, 1, shared.expert_width)

    def _output(self, out: Tensor, tokens: ScoredTokens) -> Tensor:
        if not self.layer.scope_is_moe:
            assert self.routed_out is not None
            width = self.routed_out.shape[-1]
            out = self.routed_out.reshape(-1, width) + sum(
                shared.reshape(-1, width) for shared in self.shared_out.values()
            )
        out_RD = out.detach().reshape(-1, out.shape[-1])[tokens.position_R]
        return (out_RD.float() * self.reading.readout_TD[tokens.position_R].float()).sum(-1)

    def _bias(self, routed_RD: Tensor, shared_RD: list[Tensor], tokens: ScoredTokens) -> Tensor:
        assert self.rows is not None
        bias_R = torch.zeros(routed_RD.shape[0], device=routed_RD.device)
        expert_RK = self.rows.expert_TK[tokens.position_R].clamp(max=self.layer.routed.n_experts - 1)
        weight_RK = self.rows.weight_TK[tokens.position_R]
        for k in range(expert_RK.shape[1]):
            bias = self.layer.routed.output_bias(routed_RD, expert_RK[:, k])
            if bias is not None:
                bias_R += bias * weight_RK[:, k].float()
        for shared, readout_RD in zip(self.layer.shared, shared_RD, strict=True):
            bias = shared.output_bias(readout_RD)
            if bias is not None:
                bias_R += bias
        return bias_R


def _hold_scale(norm: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
    """Let a norm in the tail pass for the scaling of channels that it amounts to at its present input.

    The value is that of the norm to the bit; only what autograd sees is linear.
    """
    x = args[0]
    if not x.requires_grad:
        return None
    with torch.no_grad():
        scale = (out.float() / x.float()).masked_fill(x == 0, 0)
    scaled = x * scale
    return out.detach() + (scaled - scaled.detach()).to(out.dtype)

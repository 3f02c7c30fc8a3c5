"""Reading the expert layers while the model runs, one layer at a time.

`instrument` puts hooks on the layers and its own experts function behind transformers' experts interface. When the
last expert of a layer has run, its contributions are computed and handed on, and nothing of it is kept.

From the first output of an expert to the end of the layer's scope, the few operations in between (its *tail*) are
recorded by autograd, and nothing else is: `score_layer` needs their transpose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mui_callback.errors import ProbeError
from mui_callback.experts.discover import ExpertLayer
from mui_callback.experts.interface import route_experts_through
from mui_callback.experts.norms import channel_scale
from mui_callback.experts.shared import SharedExperts
from mui_callback.probe.score_layer import LayerTrace, score_layer
from mui_callback.scoring.contributions import LayerScores, ScoredTokens

LayerConsumer = Callable[[int, LayerScores], None]
"""Takes the position of a layer and its contributions to one batch."""


class Reading:
    """What is read of the layers, batch by batch.

    Args:
        layers: the layers of the model.
    """

    def __init__(self, layers: tuple[ExpertLayer, ...]) -> None:
        self.layers = layers
        self._batch: _Batch | None = None

    @contextmanager
    def batch(
        self, tokens: ScoredTokens, readout_RD: Tensor, consume: LayerConsumer, *, with_output: bool = False
    ) -> Iterator[None]:
        """Every layer is read once inside, and handed to `consume`.

        Args:
            tokens: the scored tokens of the batch that the model runs inside.
            readout_RD: unembedding rows of their targets.
            consume: takes what was read of each layer.
            with_output: also hand over what the identity needs, ``LayerScores.output_R`` and ``bias_R``.

        Raises:
            ProbeError: a layer did not run, or ran twice.
        """
        readout_TD = readout_RD.new_zeros(tokens.n_rows * tokens.length, readout_RD.shape[1])
        readout_TD[tokens.position_R] = readout_RD
        batch = self._batch = _Batch(tokens, readout_TD, consume, with_output, set(range(len(self.layers))))
        try:
            yield
        finally:
            self._batch = None
        if batch.not_read:
            paths = ", ".join(self.layers[index].shape.path for index in sorted(batch.not_read))
            raise ProbeError(f"expected every MoE layer to run in a forward pass of the model; {paths} did not.")

    def take(self, index: int, trace: LayerTrace, out: Tensor) -> None:
        """Score what one layer left, if a batch is being read."""
        batch, layer = self._batch, self.layers[index]
        if batch is None:
            return
        if index not in batch.not_read:
            raise ProbeError(f"expected every MoE layer to run once in a forward pass; {layer.shape.path} ran twice.")
        batch.not_read.remove(index)
        scores = score_layer(layer, trace, out, batch.readout_TD, batch.tokens, with_output=batch.with_output)
        batch.consume(index, scores)


@dataclass
class _Batch:
    tokens: ScoredTokens
    readout_TD: Tensor
    """Unembedding row of the token that each position predicts, zero where none is scored."""
    consume: LayerConsumer
    with_output: bool
    not_read: set[int]
    """Positions of the layers that have not run yet."""


@contextmanager
def instrument(reading: Reading) -> Iterator[None]:
    """Hooks on all layers of the reading while it lasts; to be entered under `torch.no_grad`."""
    captures = [_LayerCapture(index, layer, reading) for index, layer in enumerate(reading.layers)]
    with ExitStack() as stack:
        stack.enter_context(
            route_experts_through({capture.layer.routed.module: capture.run_routed for capture in captures})
        )
        for capture in captures:
            stack.enter_context(capture.hooked())
        yield


class _LayerCapture:
    """Collects what one layer's experts do, from the begin to the end of the layer's scope."""

    def __init__(self, index: int, layer: ExpertLayer, reading: Reading) -> None:
        self.index = index
        self.layer = layer
        self.reading = reading
        self.trace = LayerTrace()

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """All hooks of this layer."""
        handles = [
            self.layer.scope.register_forward_pre_hook(self._before),
            self.layer.scope.register_forward_hook(self._after),
        ]
        for shared in self.layer.shared:
            handles += self._hook_shared(shared)
        if self.layer.scope_is_moe:
            norms = [child for child in self.layer.scope.children() if "norm" in type(child).__name__.lower()]
            handles += [norm.register_forward_hook(_hold_scale) for norm in norms]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run_routed(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Stands in for the forward of the routed experts."""
        with torch.no_grad(), torch.autocast(x_TD.device.type, enabled=False):
            out, self.trace.rows = self.layer.routed.run(x_TD, expert_TK, weight_TK)
        self.trace.routed_out = self._begin_tail(out)
        return self.trace.routed_out

    def _before(self, scope: nn.Module, args: Any) -> None:
        self.trace = LayerTrace()

    def _hook_shared(self, shared: SharedExperts) -> list[RemovableHandle]:
        def before(module: nn.Module, args: Any) -> None:
            self._record(False)

        def read(act_TW: Tensor) -> None:
            self.trace.shared_act[shared.path] = act_TW

        def after(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            self.trace.shared_out[shared.path] = self._begin_tail(out)
            return self.trace.shared_out[shared.path]

        return [
            shared.module.register_forward_pre_hook(before),
            *shared.watch(read),
            shared.module.register_forward_hook(after),
        ]

    def _after(self, scope: nn.Module, args: Any, out: Any) -> Any:
        self._record(False)
        self.reading.take(self.index, self.trace, out[0] if isinstance(out, tuple) else out)
        self.trace = LayerTrace()
        if not self.layer.scope_is_moe:
            return None
        if isinstance(out, tuple):
            return tuple(part.detach() if isinstance(part, Tensor) else part for part in out)
        return out.detach()

    def _begin_tail(self, out: Tensor) -> Tensor:
        """The output of an expert, from which on the tail is recorded."""
        self._record(True)
        return out.detach().requires_grad_() if self.layer.scope_is_moe else out

    def _record(self, on: bool) -> None:
        if self.layer.scope_is_moe:
            torch.set_grad_enabled(on)


def _hold_scale(norm: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
    """Let a norm in the tail pass for the scaling of channels that it amounts to at its present input.

    The value is that of the norm to the bit; only what autograd sees is linear.
    """
    x = args[0]
    if not x.requires_grad:
        return None
    with torch.no_grad():
        scale = channel_scale(out, x)
    scaled = x * scale
    return out.detach() + (scaled - scaled.detach()).to(out.dtype)

"""Routed experts whose weights are stacked in three-dimensional parameters.

That is the layout of every model in transformers that uses `use_experts_implementation`: ``gate_up_proj`` (or
``up_proj``) and ``down_proj`` with the experts as first axis. Which way the matrices lie, whether there are
biases, a gate or a norm after the expert is written on the module, so one class serves all of these families.

Shapes: T tokens, K experts of a token, S = T·K rows sorted by expert, E experts, I neurons of an expert, D width of the
experts' input and output, N inputs and M outputs of a matrix, R scored tokens, P pairs of one of these and an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mui_callback.errors import ProbeError, UnsupportedModelError
from mui_callback.experts.base import First
from mui_callback.experts.expert_parallelism import NOT_SPREAD, Spread
from mui_callback.experts.interface import route_experts_through
from mui_callback.experts.known_gates import known_gate
from mui_callback.experts.norms import channel_scale
from mui_callback.experts.pairs import Pairs, sort_pairs
from mui_callback.experts.stacked_recorder import RoutedRows, StackedRecorder
from mui_callback.experts.tail import Tail
from mui_callback.experts.tiles import Tile, by_tile
from mui_callback.fused import experts as fused
from mui_callback.fused.available import can_run
from mui_callback.parallel.weights import check_readable, whole_shape
from mui_callback.scoring.contributions import ScoredTokens
from mui_callback.scoring.rows import rows_at
from mui_callback.settings import Activation

_FLAGS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")


def has_stacked_layout(module: nn.Module) -> bool:
    """Whether the module is an experts module of transformers' experts interface."""
    return all(hasattr(module, flag) for flag in _FLAGS) and hasattr(module, "down_proj")


class StackedExperts:
    """Runs and reads an experts module with stacked weights.

    Args:
        path: module path, for messages.
        module: the experts module.
        spread: which experts of the layer these are, where each process has some.

    Raises:
        UnsupportedModelError: the weights will not be there as floating-point tensors of whole experts (quantised, or
            divided among processes).
    """

    def __init__(self, path: str, module: nn.Module, spread: Spread = NOT_SPREAD) -> None:
        self.path = path
        self.module: Any = module
        self.spread = spread
        self._check_weights()
        n_held, *rest = whole_shape(self.module.down_proj)  # type: ignore[arg-type]
        # Expert parallelism of transformers shows the experts of all processes from outside of a forward.
        self.n_experts = n_held
        self.n_local = n_held // spread.peers.n
        self.width = rest[0 if self.module.is_transposed else 1]

    def _check_weights(self) -> None:
        for name in self._weight_names():
            weight = getattr(self.module, name, None)
            check_readable(f"{self.path}.{name}", weight)
            if not isinstance(weight, Tensor) or len(whole_shape(weight)) != 3 or not weight.dtype.is_floating_point:
                came = f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else repr(weight)
                raise UnsupportedModelError(
                    f"{self.path}.{name}: expected a floating-point parameter [experts, …, …], got {came}. Quantised "
                    "experts cannot be probed."
                )
            if weight.dtype.itemsize == 1:
                raise UnsupportedModelError(
                    f"{self.path}.{name}: expected plain weights of 16 bits or more, got "
                    f"{type(weight.data).__name__} of {weight.dtype}. Quantised experts cannot be probed."
                )

    @property
    def layout(self) -> str:
        """See `Experts`."""
        return "stacked, transposed" if self.module.is_transposed else "stacked"

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """See `Experts`."""
        return (self.module,)

    def recorder(self, tail: Tail, first: First, activation: Activation) -> StackedRecorder:
        """See `Experts`."""
        return StackedRecorder(self, tail, first, keep_gate=activation == "gate")

    @contextmanager
    def masked(self, is_masked_EI: Tensor, note_use: Callable[[], None]) -> Iterator[None]:
        """See `Experts`."""
        first = self.spread.first(self.n_local)
        own = is_masked_EI[first : first + self.n_local]

        def forward(x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
            note_use()
            with torch.autocast(x_TD.device.type, enabled=False):
                return self.run(x_TD, expert_TK, weight_TK, own)[0]

        with route_experts_through(self.module, forward):
            yield

    def _weight_names(self) -> tuple[str, str]:
        return ("gate_up_proj" if self.module.has_gate else "up_proj", "down_proj")

    def run(
        self,
        x_TD: Tensor,
        expert_TK: Tensor,
        weight_TK: Tensor,
        is_masked_EI: Tensor | None = None,
        *,
        keep_gate: bool = False,
        tokens: ScoredTokens | None = None,
    ) -> tuple[Tensor, RoutedRows]:
        """The module's forward, with everything that a contribution is made of.

        Experts are numbered as in this process. An id of E stands for "no expert" (some routers skip, some experts
        are elsewhere): such a pair is computed with the last expert and weighted with zero, so that no row
        is left unwritten. The activations of the neurons in ``is_masked_EI`` are set to zero. With `keep_gate`, the
        rows hold what activations are made of. With `tokens`, those of the batch whose positions the experts
        are given, the rows may hold their pairs.

        Returns:
            The output ``[T, D]`` in the dtype of the input, and the rows behind it.
        """
        module, down = self.module, self.module.down_proj.detach()
        if (len(down), down.shape[1 if module.is_transposed else 2]) != (self.n_local, self.width):
            raise ProbeError(
                f"{self.path}.down_proj: expected {self.n_local} whole experts of {self.width} neurons in this "
                f"process, got {tuple(down.shape)}"
            )
        sorted_rows, pairs = sort_pairs(expert_TK, weight_TK, self.n_local, tokens)
        expert_S, row_TK = sorted_rows.expert_S, sorted_rows.row_TK

        def of_tile(tile: Tile) -> tuple[Tensor, ...]:
            own_S = tile.of(expert_S)
            x_SD = rows_at(x_TD, tile.of(sorted_rows.from_S))
            act_SI, *kept = self._activations(x_SD, own_S, tile, keep_gate=keep_gate)
            if is_masked_EI is not None:
                act_SI = act_SI.masked_fill(is_masked_EI[own_S.long()], 0)
            return tile.product(act_SI, self._inputs_first(down)), act_SI, *kept

        raw_SD, act_SI, *kept = by_tile(of_tile, sorted_rows.end_E, len(expert_S))
        bias = self._bias("down_proj")
        if can_run(raw_SD, weight_TK) and not module.has_post_expert_norm:
            out_TD = fused.combined(raw_SD, bias, row_TK, expert_TK, weight_TK, self.n_local)
        else:
            raw_SD = raw_SD if bias is None else raw_SD + bias[expert_S.long()]
            out_SD = module.post_expert_norm(raw_SD) if module.has_post_expert_norm else raw_SD
            weight_S = weight_TK.masked_fill(expert_TK >= self.n_local, 0).flatten()[sorted_rows.order_S]
            out_TD = _added_up(out_SD * weight_S.unsqueeze(-1), row_TK)

        rows = RoutedRows(
            expert_TK,
            weight_TK,
            row_TK=row_TK,
            pairs=pairs,
            act_SI=act_SI,
            raw_SD=raw_SD if module.has_post_expert_norm else None,
            up_S=kept[0] if kept else None,
            down=down,
            down_bias=None if bias is None else bias.detach(),
        )
        return out_TD.to(x_TD.dtype), rows

    def _activations(self, x_SD: Tensor, expert_S: Tensor, tile: Tile, *, keep_gate: bool) -> tuple[Tensor, ...]:
        """Activations ``[S, I]`` of the rows of a tile; with `keep_gate` also what they are made of."""
        module, (name, _) = self.module, self._weight_names()
        up_S, bias = tile.product(x_SD, self._inputs_first(getattr(module, name))), self._bias(name)
        gate = known_gate(module) if can_run(up_S) and not keep_gate else None
        if gate is not None:
            return (fused.gated(gate, up_S, bias, expert_S),)
        up_S = up_S if bias is None else up_S + bias[expert_S.long()]
        act_SI = module._apply_gate(up_S) if module.has_gate else module.act_fn(up_S)
        return (act_SI, up_S) if keep_gate else (act_SI,)

    def gate(self, rows: RoutedRows) -> Tensor:
        """act(x·W_g) of rows that were run with `keep_gate`, ``[S, I]``.

        Raises:
            ProbeError: activations are made in another way.
        """
        module = self.module
        if not module.has_gate:
            return rows.act_SI
        up_S, width = rows.up_S, self.width
        assert up_S is not None
        gate_half_SI, factor_SI = (
            (up_S[:, :width], up_S[:, width:])
            if getattr(module, "is_concatenated", True)
            else (up_S[:, ::2], up_S[:, 1::2])
        )
        gate_SI: Tensor | None = module.act_fn(gate_half_SI) if hasattr(module, "act_fn") else None
        if gate_SI is None or not torch.allclose(gate_SI * factor_SI, rows.act_SI, 0.02, 1e-4, equal_nan=True):
            raise ProbeError(
                f"{self.path}: activation='gate' wants activations of the form act(x·W_g)·(x·W_u), but these experts "
                f"make theirs in another way ({type(module).__name__}._apply_gate)."
            )
        return gate_SI

    def _inputs_first(self, weight: Tensor) -> Tensor:
        """As `Tile.product` takes it, ``[E, N, M]``."""
        return weight if self.module.is_transposed else weight.transpose(-2, -1)

    def _bias(self, name: str) -> Tensor | None:
        bias: Tensor | None = getattr(self.module, f"{name}_bias") if self.module.has_bias else None
        return bias

    def project(self, rows: RoutedRows, pairs: Pairs, readout_RD: Tensor) -> Tensor:
        """⟨W_d[:, j], readout⟩ for each neuron j of each pair's expert.

        Args:
            rows: what `run` left.
            pairs: P of them.
            readout_RD: readout of each scored token, which ``pairs.from_P`` counts.

        Returns:
            ``[P, I]`` in the dtype of the weight.
        """
        down = rows.down.transpose(-2, -1) if self.module.is_transposed else rows.down

        def of_tile(tile: Tile) -> tuple[Tensor]:
            readout_PD = rows_at(readout_RD, tile.of(pairs.from_P))
            if rows.raw_SD is not None:
                readout_PD = self._through_norm(readout_PD, rows.raw_SD[tile.of(pairs.row_P)])
            return (tile.product(readout_PD, down),)

        return by_tile(of_tile, pairs.end_E, len(pairs.from_P))[0]

    def _through_norm(self, readout_PD: Tensor, raw_PD: Tensor) -> Tensor:
        """The readout in front of the norm that follows an expert, float32 ``[P, D]``; `raw_PD` was its input."""
        raw_PD = raw_PD.float()
        return readout_PD * channel_scale(self.module.post_expert_norm(raw_PD), raw_PD)


def _added_up(x_SD: Tensor, row_TK: Tensor) -> Tensor:
    """The sum of K rows each, ``[T, D]``."""
    if x_SD.device.type == "cpu" and x_SD.dtype == torch.float32:  # without any of them in memory twice
        return torch.nn.functional.embedding_bag(row_TK, x_SD, mode="sum")
    return x_SD[row_TK].sum(dim=1)

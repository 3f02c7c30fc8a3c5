"""Routed experts whose weights are stacked in three-dimensional parameters.

That is the layout of every model in transformers that uses `use_experts_implementation`: ``gate_up_proj`` (or
``up_proj``) and ``down_proj`` with the experts as first axis. Which way the matrices lie, whether there are
biases, a gate or a norm after the expert is written on the module, so one class serves all of these families.

Shapes: T tokens, K experts of a token, S = T·K rows sorted by expert, E experts, I neurons of an expert,
D width of the experts' input and output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mui_callback.errors import ProbeError, UnsupportedModelError
from mui_callback.experts.grouped import group_offsets, grouped_mm
from mui_callback.experts.interface import route_experts_through
from mui_callback.experts.norms import channel_scale
from mui_callback.experts.tail import Cut, Tail, add_inner
from mui_callback.scoring.contributions import ExpertScores, ScoredTokens, contributions, only_finite

_FLAGS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")


def has_stacked_layout(module: nn.Module) -> bool:
    """Whether the module is an experts module of transformers' experts interface."""
    return all(hasattr(module, flag) for flag in _FLAGS) and hasattr(module, "down_proj")


@dataclass(frozen=True)
class RoutedRows:
    """What the experts did with each (token, expert) pair, sorted by expert.

    ``row_TK`` says which row the k-th expert of a token is; ``act_SI`` are the activations that feed the down
    projection; ``raw_SD`` is the experts' output before the norm that follows it, where there is one; ``down`` is the
    down projection as it was in this forward (adapters make it anew each time).
    """

    expert_TK: Tensor
    weight_TK: Tensor
    row_TK: Tensor
    act_SI: Tensor
    raw_SD: Tensor | None
    down: Tensor


class StackedExperts:
    """Runs and reads an experts module with stacked weights.

    Args:
        path: module path, for messages.
        module: the experts module.

    Raises:
        UnsupportedModelError: the weights are not there as plain floating-point tensors (quantised, or sharded
            over processes).
    """

    def __init__(self, path: str, module: nn.Module) -> None:
        self.path = path
        self.module: Any = module
        self._check_weights()

    def _check_weights(self) -> None:
        if getattr(self.module, "_is_expert_parallel", False):
            raise UnsupportedModelError(
                f"{self.path}: its experts are spread over processes (expert parallelism), which cannot be probed yet."
            )
        for name in self._weight_names():
            weight = getattr(self.module, name, None)
            if not isinstance(weight, Tensor) or weight.dim() != 3 or not weight.dtype.is_floating_point:
                came = f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else repr(weight)
                raise UnsupportedModelError(
                    f"{self.path}.{name}: expected a floating-point parameter [experts, …, …] that is whole in this "
                    f"process, got {came}. Quantised and sharded experts cannot be probed."
                )
            if weight.dtype.itemsize == 1 or type(weight.data).__name__ == "DTensor":
                raise UnsupportedModelError(
                    f"{self.path}.{name}: expected plain weights of 16 bits or more, got "
                    f"{type(weight.data).__name__} of {weight.dtype}. Quantised and sharded experts cannot be probed."
                )

    @property
    def layout(self) -> str:
        """See `Experts`."""
        return "stacked, transposed" if self.module.is_transposed else "stacked"

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """See `Experts`."""
        return (self.module,)

    def recorder(self, tail: Tail, first_neuron: int) -> StackedRecorder:
        """See `Experts`."""
        return StackedRecorder(self, tail, first_neuron)

    def _weight_names(self) -> tuple[str, str]:
        return ("gate_up_proj" if self.module.has_gate else "up_proj", "down_proj")

    @property
    def n_experts(self) -> int:
        """Routed experts, E."""
        return int(self.module.down_proj.shape[0])

    @property
    def width(self) -> int:
        """Neurons of each expert, I."""
        return int(self.module.down_proj.shape[1 if self.module.is_transposed else 2])

    def run(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> tuple[Tensor, RoutedRows]:
        """The module's forward, with everything that a contribution is made of.

        An id of E stands for "no expert" (some routers skip): such a pair is computed with the last expert and
        weighted with zero, so that no row is left unwritten.

        Returns:
            The output ``[T, D]`` in the dtype of the input, and the rows behind it.
        """
        module, (n_tokens, top_k) = self.module, expert_TK.shape
        expert_S, order_S = expert_TK.flatten().clamp(max=self.n_experts - 1).sort(stable=True)
        offsets_E = group_offsets(expert_S, self.n_experts)
        row_S = torch.empty_like(order_S)
        row_S[order_S] = torch.arange(order_S.shape[0], device=order_S.device)
        weight_TK = weight_TK.masked_fill(expert_TK >= self.n_experts, 0)

        up_name, _ = self._weight_names()
        up_S = self._linear(x_TD[order_S // top_k], up_name, expert_S, offsets_E)
        act_SI = module._apply_gate(up_S) if module.has_gate else module.act_fn(up_S)
        raw_SD = self._linear(act_SI, "down_proj", expert_S, offsets_E)
        out_SD = module.post_expert_norm(raw_SD) if module.has_post_expert_norm else raw_SD
        weighted_SD = out_SD * weight_TK.flatten()[order_S].unsqueeze(-1)
        out_TD = weighted_SD[row_S].view(n_tokens, top_k, -1).sum(dim=1).to(x_TD.dtype)

        rows = RoutedRows(
            expert_TK,
            weight_TK,
            row_TK=row_S.view(n_tokens, top_k),
            act_SI=act_SI,
            raw_SD=raw_SD if module.has_post_expert_norm else None,
            down=module.down_proj,
        )
        return out_TD, rows

    def _linear(self, x_SN: Tensor, name: str, expert_S: Tensor, offsets_E: Tensor) -> Tensor:
        weight = getattr(self.module, name)
        out = grouped_mm(x_SN, weight if self.module.is_transposed else weight.transpose(-2, -1), offsets_E)
        return out + getattr(self.module, f"{name}_bias")[expert_S] if self.module.has_bias else out

    def project(self, rows: RoutedRows, readout_SD: Tensor, expert_S: Tensor) -> Tensor:
        """⟨W_d[:, j], readout⟩ for each neuron j of each row's expert.

        Args:
            rows: what `run` left.
            readout_SD: ``[S, D]``, sorted by expert.
            expert_S: int64 ``[S]``, ascending.

        Returns:
            ``[S, I]`` in the dtype of the weight.
        """
        down = rows.down
        offsets_E = group_offsets(expert_S, self.n_experts)
        return grouped_mm(readout_SD, down.transpose(-2, -1) if self.module.is_transposed else down, offsets_E)

    def through_norm(self, readout_SD: Tensor, raw_SD: Tensor) -> Tensor:
        """The readout in front of the norm that follows an expert, whose input was `raw_SD`."""
        raw_SD = raw_SD.float()
        return readout_SD * channel_scale(self.module.post_expert_norm(raw_SD), raw_SD)

    def output_bias(self, readout_SD: Tensor, expert_S: Tensor) -> Tensor | None:
        """⟨b_d, readout⟩ of each row, ``[S]``: the part of an expert's output that no neuron makes."""
        if not self.module.has_bias:
            return None
        bias_ED: Tensor = self.module.down_proj_bias
        return (bias_ED[expert_S].float() * readout_SD.float()).sum(-1)


class StackedRecorder:
    """See `Recorder`."""

    def __init__(self, experts: StackedExperts, tail: Tail, first_neuron: int) -> None:
        self.experts = experts
        self.tail = tail
        self.first_neuron = first_neuron
        self.clear()

    def clear(self) -> None:
        """See `Recorder`."""
        self.rows: RoutedRows | None = None
        self.cut: Cut | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """See `Recorder`."""
        with route_experts_through(self.experts.module, self._run):
            yield

    def _run(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(x_TD.device.type, enabled=False):
            out_TD, self.rows = self.experts.run(x_TD, expert_TK, weight_TK)
        self.cut = self.tail.cut(out_TD)
        return self.cut.value

    @property
    def has_run(self) -> bool:
        """See `Recorder`."""
        return self.rows is not None

    def check_complete(self, tokens: ScoredTokens) -> None:
        """See `Recorder`."""
        if self.rows is None:
            raise ProbeError(
                f"{self.tail.where} ran without calling its experts through transformers' experts interface. "
                "Was its forward replaced, by a kernel from the hub for example?"
            )
        expected, seen = tokens.n_rows * tokens.length, self.rows.expert_TK.shape[0]
        if seen != expected:
            raise ProbeError(
                f"{self.tail.where}: expected its experts to see the {expected} positions of the batch, one row each, "
                f"got {seen}."
            )

    def locate(self, out: Tensor, tokens: ScoredTokens, *, check: bool) -> None:
        """See `Recorder`: the rows of the output are the positions, in order."""
        assert self.cut is not None
        if check and not self.tail.is_in_order(out, [self.cut], tokens):
            raise ProbeError(
                f"{self.tail.where}: expected its experts to see the positions of the batch in their order, as "
                "[batch, positions, width], got them in another."
            )

    def scores(self, tokens: ScoredTokens) -> ExpertScores:
        """See `Recorder`."""
        rows, readout_RD = self._read(tokens)
        expert_RK, by_expert_RK = rows.expert_TK[tokens.position_R].sort(dim=1)
        weight_RK = rows.weight_TK[tokens.position_R].gather(1, by_expert_RK)
        row_RK = rows.row_TK[tokens.position_R].gather(1, by_expert_RK)
        top_k = expert_RK.shape[1]

        expert_S, order_S = expert_RK.flatten().sort(stable=True)
        token_S, rank_S = order_S // top_k, order_S % top_k
        row_S = row_RK.flatten()[order_S]
        is_row_S = expert_S < self.experts.n_experts
        expert_S = expert_S.clamp(max=self.experts.n_experts - 1)
        readout_SD = readout_RD[token_S]
        if rows.raw_SD is not None:
            readout_SD = self.experts.through_norm(readout_SD, rows.raw_SD[row_S])
        projected_SI = self.experts.project(rows, readout_SD, expert_S)
        score_SI, n_not_finite = only_finite(
            contributions(rows.act_SI[row_S], projected_SI, weight_RK.flatten()[order_S])
        )
        return ExpertScores(
            score_SI.masked_fill_(~is_row_S.unsqueeze(-1), float("-inf")),
            token_S,
            first_neuron_S=self.first_neuron + expert_S * self.experts.width,
            rank_S=rank_S,
            rows_per_token=top_k,
            expert_width=self.experts.width,
            n_not_finite=n_not_finite,
            is_row_S=is_row_S,
        )

    def add_output(self, output_R: Tensor, tokens: ScoredTokens) -> None:
        """See `Recorder`."""
        assert self.cut is not None
        add_inner(output_R, tokens.numbers(), self.cut.value_SD, self.cut.readout_SD)

    def add_unmade(self, unmade_R: Tensor, tokens: ScoredTokens) -> None:
        """See `Recorder`."""
        rows, readout_RD = self._read(tokens)
        expert_RK = rows.expert_TK[tokens.position_R].clamp(max=self.experts.n_experts - 1)
        weight_RK = rows.weight_TK[tokens.position_R].float()
        for expert_R, weight_R in zip(expert_RK.unbind(1), weight_RK.unbind(1), strict=True):
            bias_R = self.experts.output_bias(readout_RD, expert_R)
            if bias_R is not None:
                unmade_R += bias_R * weight_R

    def _read(self, tokens: ScoredTokens) -> tuple[RoutedRows, Tensor]:
        assert self.rows is not None
        assert self.cut is not None
        return self.rows, self.cut.readout_SD[tokens.position_R]

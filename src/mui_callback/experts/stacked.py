"""Routed experts whose weights are stacked in three-dimensional parameters.

That is the layout of every model in transformers that uses `use_experts_implementation`: ``gate_up_proj`` (or
``up_proj``) and ``down_proj`` with the experts as first axis. Which way the matrices lie, whether there are
biases, a gate or a norm after the expert is written on the module, so one class serves all of these families.

Shapes: T tokens, K experts of a token, S = T·K rows sorted by expert, E experts, I neurons of an expert,
D width of the experts' input and output, P rows of T with scored tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mui_callback.errors import ProbeError, UnsupportedModelError
from mui_callback.experts.expert_parallelism import NOT_SPREAD, Spread
from mui_callback.experts.grouped import group_offsets, grouped_mm
from mui_callback.experts.interface import route_experts_through
from mui_callback.experts.norms import channel_scale
from mui_callback.experts.tail import Cut, Tail, add_inner
from mui_callback.parallel.weights import check_readable, whole_shape
from mui_callback.scoring.contributions import (
    ExpertScores,
    ScoredTokens,
    contributions,
    only_finite,
    rank_in_token,
)

_FLAGS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")


def has_stacked_layout(module: nn.Module) -> bool:
    """Whether the module is an experts module of transformers' experts interface."""
    return all(hasattr(module, flag) for flag in _FLAGS) and hasattr(module, "down_proj")


@dataclass(frozen=True)
class RoutedRows:
    """What the experts did with each (token, expert) pair, sorted by expert.

    ``row_TK`` says which row the k-th expert of a token is; ``act_SI`` are the activations that feed the down
    projection; ``raw_SD`` is the experts' output before the norm that follows it, where there is one; ``down`` and
    ``down_bias`` are the down projection as it was in this forward (adapters make it anew each time, expert
    parallelism puts the part of this process there).
    """

    expert_TK: Tensor
    weight_TK: Tensor
    row_TK: Tensor
    act_SI: Tensor
    raw_SD: Tensor | None
    down: Tensor
    down_bias: Tensor | None


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

    def recorder(self, tail: Tail, first_neuron: int) -> StackedRecorder:
        """See `Experts`."""
        return StackedRecorder(self, tail, first_neuron)

    def _weight_names(self) -> tuple[str, str]:
        return ("gate_up_proj" if self.module.has_gate else "up_proj", "down_proj")

    def run(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> tuple[Tensor, RoutedRows]:
        """The module's forward, with everything that a contribution is made of.

        Experts are numbered as in this process. An id of E stands for "no expert" (some routers skip, some experts
        are elsewhere): such a pair is computed with the last expert and weighted with zero, so that no row
        is left unwritten.

        Returns:
            The output ``[T, D]`` in the dtype of the input, and the rows behind it.
        """
        module, (n_tokens, top_k) = self.module, expert_TK.shape
        width = module.down_proj.shape[1 if module.is_transposed else 2]
        if (len(module.down_proj), width) != (self.n_local, self.width):
            raise ProbeError(
                f"{self.path}.down_proj: expected {self.n_local} whole experts of {self.width} neurons in this "
                f"process, got {tuple(module.down_proj.shape)}"
            )
        expert_S, order_S = expert_TK.flatten().clamp(max=self.n_local - 1).sort(stable=True)
        offsets_E = group_offsets(expert_S, self.n_local)
        row_S = torch.empty_like(order_S)
        row_S[order_S] = torch.arange(order_S.shape[0], device=order_S.device)
        weight_TK = weight_TK.masked_fill(expert_TK >= self.n_local, 0)

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
            down=module.down_proj.detach(),
            down_bias=module.down_proj_bias.detach() if module.has_bias else None,
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
        offsets_E = group_offsets(expert_S, self.n_local)
        return grouped_mm(readout_SD, down.transpose(-2, -1) if self.module.is_transposed else down, offsets_E)

    def through_norm(self, readout_SD: Tensor, raw_SD: Tensor) -> Tensor:
        """The readout in front of the norm that follows an expert, whose input was `raw_SD`."""
        raw_SD = raw_SD.float()
        return readout_SD * channel_scale(self.module.post_expert_norm(raw_SD), raw_SD)


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
        self.token_T: Tensor | None = None
        """Number of the scored token of each row, -1 where there is none; None if the rows are the positions."""

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
        if seen != expected and self.experts.spread.peers.is_alone:
            raise ProbeError(
                f"{self.tail.where}: expected its experts to see the {expected} positions of the batch, one row each, "
                f"got {seen}."
            )

    def locate(self, out: Tensor, tokens: ScoredTokens, *, check: bool) -> None:
        """See `Recorder`: in one process, the rows of the output are the positions, in order."""
        assert self.cut is not None
        if not self.experts.spread.peers.is_alone:
            (self.token_T,) = self.tail.tokens_of(out, [self.cut], tokens)
            return
        if check and not self.tail.is_in_order(out, [self.cut], tokens):
            raise ProbeError(
                f"{self.tail.where}: expected its experts to see the positions of the batch in their order, as "
                "[batch, positions, width], got them in another."
            )

    def scores(self, tokens: ScoredTokens) -> ExpertScores:
        """See `Recorder`."""
        rows, place_P, token_P, readout_PD = self._read(tokens)
        n_local, top_k = self.experts.n_local, rows.expert_TK.shape[1]
        expert_PK, by_expert_PK = rows.expert_TK[place_P].sort(dim=1)
        weight_PK = rows.weight_TK[place_P].gather(1, by_expert_PK)
        row_PK = rows.row_TK[place_P].gather(1, by_expert_PK)

        expert_S, order_S = expert_PK.flatten().sort(stable=True)
        from_S, rank_S = order_S // top_k, order_S % top_k
        row_S, token_S = row_PK.flatten()[order_S], token_P[from_S]
        is_row_S = expert_S < n_local
        expert_S = expert_S.clamp(max=n_local - 1)
        if self.token_T is not None:  # a token may have several rows
            rank_S = rank_in_token(token_S, expert_S)
            top_k = int(rank_S.max()) + 1 if len(rank_S) else 1
        readout_SD = readout_PD[from_S]
        if rows.raw_SD is not None:
            readout_SD = self.experts.through_norm(readout_SD, rows.raw_SD[row_S])
        projected_SI = self.experts.project(rows, readout_SD, expert_S)
        score_SI, n_not_finite = only_finite(
            contributions(rows.act_SI[row_S], projected_SI, weight_PK.flatten()[order_S])
        )
        first_expert = self.experts.spread.first(n_local)
        return ExpertScores(
            score_SI.masked_fill_(~is_row_S.unsqueeze(-1), float("-inf")),
            token_S,
            first_neuron_S=self.first_neuron + (first_expert + expert_S) * self.experts.width,
            rank_S=rank_S,
            rows_per_token=top_k,
            expert_width=self.experts.width,
            n_not_finite=n_not_finite,
            is_row_S=is_row_S,
        )

    def add_output(self, output_R: Tensor, tokens: ScoredTokens) -> None:
        """See `Recorder`."""
        assert self.cut is not None
        token_T = tokens.numbers() if self.token_T is None else self.token_T
        add_inner(output_R, token_T, self.cut.value_SD, self.cut.readout_SD)

    def add_unmade(self, unmade_R: Tensor, tokens: ScoredTokens) -> None:
        """See `Recorder`: output biases."""
        rows, place_P, token_P, readout_PD = self._read(tokens)
        if rows.down_bias is None:
            return
        expert_PK = rows.expert_TK[place_P].clamp(max=self.experts.n_local - 1)
        weight_PK = rows.weight_TK[place_P].float()
        for expert_P, weight_P in zip(expert_PK.unbind(1), weight_PK.unbind(1), strict=True):
            add_inner(unmade_R, token_P, rows.down_bias[expert_P], readout_PD * weight_P[:, None])

    def _read(self, tokens: ScoredTokens) -> tuple[RoutedRows, Tensor, Tensor, Tensor]:
        """What the experts did; the rows with scored tokens, their tokens, and their readouts ``[P, D]``."""
        assert self.rows is not None
        assert self.cut is not None
        if self.token_T is None:
            place_P = tokens.position_R
            token_P = tokens.first + torch.arange(len(place_P), device=place_P.device)
        else:
            (place_P,) = torch.nonzero(self.token_T >= 0, as_tuple=True)
            token_P = self.token_T[place_P]
        return self.rows, place_P, token_P, self.cut.readout_SD[place_P]

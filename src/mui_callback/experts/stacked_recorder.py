"""Reading experts with stacked weights.

Shapes: T rows that the experts were given, K experts of a row, S = T·K pairs sorted by expert, I neurons of an expert,
D width of the experts' input and output, P rows of T with scored tokens, R scored tokens that meet.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mui_callback.errors import ProbeError
from mui_callback.experts.base import First
from mui_callback.experts.cut import Cut, add_inner
from mui_callback.experts.interface import route_experts_through
from mui_callback.experts.tail import Tail
from mui_callback.scoring.contributions import ExpertScores, ScoredTokens, rank_of_row
from mui_callback.scoring.rows import Contributions
from mui_callback.settings import Activation

if TYPE_CHECKING:
    from mui_callback.experts.stacked import StackedExperts


@dataclass(frozen=True)
class RoutedRows:
    """What the experts did with each (token, expert) pair, sorted by expert.

    ``row_TK`` says which row the k-th expert of a token is; ``act_SI`` are the activations that feed the down
    projection, ``up_S`` what they are made of, where that was asked for; ``raw_SD`` is the experts' output before the
    norm that follows it, where there is one; ``down`` and ``down_bias`` are the down projection as it was in this
    forward (adapters make it anew each time, expert parallelism puts the part of this process there).
    """

    expert_TK: Tensor
    weight_TK: Tensor
    row_TK: Tensor
    act_SI: Tensor
    up_S: Tensor | None
    raw_SD: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class StackedRecorder:
    """See `Recorder`."""

    def __init__(self, experts: StackedExperts, tail: Tail, first: First, *, keep_gate: bool) -> None:
        self.experts = experts
        self.keep_gate = keep_gate
        self.tail = tail
        self.first = first
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
            out_TD, self.rows = self.experts.run(x_TD, expert_TK, weight_TK, keep_gate=self.keep_gate)
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

    @property
    def knows_order(self) -> bool:
        """In one process, the rows of the output are the positions."""
        return self.experts.spread.peers.is_alone

    trusts_dispatch = False
    is_followed = False

    def announce(self, tokens: ScoredTokens, readout_RD: Tensor) -> None:
        """See `Recorder`: the rows of the output are asked of the tail, or known."""

    def follow(self, tokens: ScoredTokens) -> None:
        """See `Recorder`."""
        assert self.cut is not None
        self.cut.token_S, self.cut.weight_S = tokens.numbers(), None

    def learn(self, tokens: ScoredTokens) -> None:
        """See `Recorder`."""
        assert self.cut is not None
        self.tail.raise_if_mixed(is_mixed=False)
        if self.knows_order and len(tokens.position_R) and not self.cut.is_in_order(tokens):
            raise ProbeError(
                f"{self.tail.where}: expected its experts to see the positions of the batch in their order, as "
                "[batch, positions, width], got them in another."
            )

    def scores(self, tokens: ScoredTokens, readout_RD: Tensor, activation: Activation) -> ExpertScores:
        """See `Recorder`."""
        rows, place_P, token_P = self._read(tokens)
        act_SI = self.experts.gate(rows) if activation == "gate" else rows.act_SI
        assert self.cut is not None
        n_local, top_k = self.experts.n_local, rows.expert_TK.shape[1]
        readout_PD, scale_P = self.cut.readouts_of(place_P, readout_RD)
        expert_PK, by_expert_PK = rows.expert_TK[place_P].sort(dim=1)
        weight_PK = rows.weight_TK[place_P].gather(1, by_expert_PK).float()
        if scale_P is not None:
            weight_PK = weight_PK * scale_P[:, None]

        expert_S, order_S = expert_PK.flatten().sort(stable=True)
        from_S, rank_S = order_S // top_k, order_S % top_k
        row_S, token_S = rows.row_TK[place_P].gather(1, by_expert_PK).flatten()[order_S], token_P[from_S]
        is_row_S = expert_S < n_local
        expert_S = expert_S.clamp(max=n_local - 1)
        if not self.knows_order:  # a token may have several rows
            self.tail.raise_if_mixed(is_mixed=bool(self.tail.is_mixed))
            rank_S = rank_of_row(token_S, expert_S, n_local)
            top_k = int(rank_S.max()) + 1 if len(rank_S) else 1
        readout_SD = readout_PD[from_S]
        if rows.raw_SD is not None:
            readout_SD = self.experts.through_norm(readout_SD, rows.raw_SD[row_S])
        expert_of_layer_S = self.experts.spread.first(n_local) + expert_S
        return ExpertScores(
            Contributions(
                act_SI[row_S],
                self.experts.project(rows, readout_SD, expert_S),
                weight_PK.flatten()[order_S],
                is_row_S,
            ),
            token_S,
            self.first.expert + expert_of_layer_S,
            first_neuron_S=self.first.neuron + expert_of_layer_S * self.experts.width,
            rank_S=rank_S,
            rows_per_token=top_k,
        )

    def add_output(self, output_R: Tensor, readout_RD: Tensor) -> None:
        """See `Recorder`."""
        assert self.cut is not None
        assert self.cut.token_S is not None
        add_inner(output_R, self.cut.token_S, self.cut.value_SD, self.cut.all_readouts(readout_RD))

    def add_unmade(self, unmade_R: Tensor, tokens: ScoredTokens, readout_RD: Tensor) -> None:
        """See `Recorder`: output biases."""
        rows, place_P, token_P = self._read(tokens)
        if rows.down_bias is None:
            return
        assert self.cut is not None
        readout_PD = self.cut.all_readouts(readout_RD)[place_P]
        expert_PK = rows.expert_TK[place_P].clamp(max=self.experts.n_local - 1)
        weight_PK = rows.weight_TK[place_P].float()
        for expert_P, weight_P in zip(expert_PK.unbind(1), weight_PK.unbind(1), strict=True):
            add_inner(unmade_R, token_P, rows.down_bias[expert_P], readout_PD * weight_P[:, None])

    def _read(self, tokens: ScoredTokens) -> tuple[RoutedRows, Tensor, Tensor]:
        """What the experts did, which rows have scored tokens, and which."""
        assert self.rows is not None
        assert self.cut is not None
        if self.knows_order:
            place_P = tokens.position_R
            return self.rows, place_P, tokens.first + torch.arange(len(place_P), device=place_P.device)
        assert self.cut.token_S is not None
        (place_P,) = torch.nonzero(self.cut.token_S >= 0, as_tuple=True)
        return self.rows, place_P, self.cut.token_S[place_P]

"""Reading experts with stacked weights.

Shapes: T tokens that the experts were given, K experts of a token, S = T·K pairs sorted by expert, I neurons of an
expert, D width of the experts' input and output, N of the T tokens that are scored, P = N·K pairs of these, R scored
tokens that meet.
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
from mui_callback.experts.pairs import Pairs
from mui_callback.experts.tail import Tail
from mui_callback.experts.unrecorded import unrecorded
from mui_callback.scoring.contributions import ExpertScores, ScoredTokens, rank_of_row
from mui_callback.scoring.rows import Contributions
from mui_callback.settings import Activation

if TYPE_CHECKING:
    from mui_callback.experts.stacked import StackedExperts


@dataclass(frozen=True)
class RoutedRows:
    """What the experts did with each (token, expert) pair, sorted by expert.

    ``row_TK`` says which row the k-th expert of a token is; ``pairs`` are those of scored tokens, where they were found
    on the way; ``act_SI`` are the activations that feed the down projection, ``up_S`` what they are made of, where that
    was asked for; ``raw_SD`` is the experts' output before the norm that follows it, where there is one; ``down`` and
    ``down_bias`` are the down projection as it was in this forward (adapters make it anew each time, expert parallelism
    puts the part of this process there).
    """

    expert_TK: Tensor
    weight_TK: Tensor
    row_TK: Tensor
    pairs: Pairs | None
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
        self.is_direct = False
        self.clear()

    def clear(self) -> None:
        """See `Recorder`."""
        self._announced: ScoredTokens | None = None
        self.rows: RoutedRows | None = None
        self.cut: Cut | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """See `Recorder`."""
        with route_experts_through(self.experts.module, self._run):
            yield

    def _run(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        with unrecorded(x_TD.device):
            out_TD, self.rows = self.experts.run(
                *(x_TD, expert_TK, weight_TK),
                keep_gate=self.keep_gate,
                tokens=self._announced if self.knows_order else None,
            )
        if self.is_followed:
            return out_TD
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

    @property
    def cuts(self) -> list[Cut]:
        """See `Recorder`."""
        return [] if self.cut is None else [self.cut]

    @property
    def can_be_direct(self) -> bool:
        """See `Recorder`."""
        return self.knows_order

    @property
    def is_followed(self) -> bool:
        """See `Recorder`: nothing has to be asked of the tail."""
        return self.is_direct and self._announced is not None

    def announce(self, tokens: ScoredTokens, readout_RD: Tensor) -> None:
        """See `Recorder`: the rows of the output are known, or asked of the tail."""
        self._announced = tokens

    def meet(self) -> None:
        """See `Recorder`: there is nothing to tell."""

    def follow(self, tokens: ScoredTokens) -> None:
        """See `Recorder`."""
        if self.cut is None:
            return
        self.cut.token_S, self.cut.weight_S = tokens.number_T, None

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
        rows, place_N, token_N = self._read(tokens)
        n_local, top_k = self.experts.n_local, rows.expert_TK.shape[1]
        pairs = rows.pairs or Pairs.of(place_N, rows.expert_TK, rows.weight_TK, rows.row_TK, n_local)
        weight_P, rank_P = pairs.weight_P, pairs.rank_P
        token_P = token_N[pairs.from_P] if tokens.first or not self.knows_order else pairs.from_P
        readout_ND, scale_N = self._readouts(place_N, readout_RD)
        if scale_N is not None:
            weight_P = weight_P * scale_N[pairs.from_P]
        if not self.knows_order:  # a token may have several rows
            self.tail.raise_if_mixed(is_mixed=bool(self.tail.is_mixed))
            rank_P = rank_of_row(token_P, pairs.expert_P, n_local)
            top_k = int(rank_P.max()) + 1 if len(rank_P) else 1
        first_here = self.first.expert + self.experts.spread.first(n_local)
        return ExpertScores(
            Contributions(
                self.experts.gate(rows) if activation == "gate" else rows.act_SI,
                self.experts.project(rows, pairs, readout_ND),
                weight_P,
                pairs.is_row_P,
                pairs.row_P,
            ),
            token_P,
            pairs.expert_P + first_here if first_here else pairs.expert_P,
            rank_S=rank_P,
            rows_per_token=top_k,
            first_expert=self.first.expert,
            first_neuron=self.first.neuron,
        )

    def _readouts(self, place_N: Tensor, readout_RD: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Cut.readouts_of`."""
        if self.cut is None:
            return readout_RD, None
        return self.cut.readouts_of(place_N, readout_RD)

    def add_output(self, output_R: Tensor, readout_RD: Tensor) -> None:
        """See `Recorder`."""
        assert self.cut is not None
        assert self.cut.token_S is not None
        add_inner(output_R, self.cut.token_S, self.cut.value_SD, self.cut.all_readouts(readout_RD))

    def add_unmade(self, unmade_R: Tensor, tokens: ScoredTokens, readout_RD: Tensor) -> None:
        """See `Recorder`: output biases."""
        rows, place_N, token_N = self._read(tokens)
        if rows.down_bias is None:
            return
        readout_ND = readout_RD if self.cut is None else self.cut.all_readouts(readout_RD)[place_N]
        expert_NK, n_local = rows.expert_TK[place_N], self.experts.n_local
        weight_NK = rows.weight_TK[place_N].float().masked_fill(expert_NK >= n_local, 0)
        expert_NK = expert_NK.clamp(max=n_local - 1)
        for expert_N, weight_N in zip(expert_NK.unbind(1), weight_NK.unbind(1), strict=True):
            add_inner(unmade_R, token_N, rows.down_bias[expert_N], readout_ND * weight_N[:, None])

    def _read(self, tokens: ScoredTokens) -> tuple[RoutedRows, Tensor, Tensor]:
        """What the experts did, which rows have scored tokens, and which."""
        assert self.rows is not None
        if self.knows_order:
            return self.rows, tokens.position_R, tokens.own_numbers
        assert self.cut is not None
        assert self.cut.token_S is not None
        (place_N,) = torch.nonzero(self.cut.token_S >= 0, as_tuple=True)
        return self.rows, place_N, self.cut.token_S[place_N]

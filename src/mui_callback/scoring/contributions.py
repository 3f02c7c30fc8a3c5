"""Contribution of every expert neuron to every response token (arXiv 2509.23933, section 3).

    f(l, i, j, y_t) = G_i(x_{t-1}) · a_j(x_{t-1}) · ⟨W_d[:, j], W_head[y_t]⟩

The unembedding row of the target, W_head[y_t], enters as the *readout* of the token: what the output of an expert
is multiplied with to become its share of the target's logit.

Shapes: B samples, T positions of each, R scored tokens of the batch, S rows of scores, E experts, M
anything that is added up.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mui_callback.scoring.rows import Contributions


@dataclass(frozen=True, kw_only=True)
class Responses:
    """Response tokens of some samples, ordered by sample and position.

    ``row_R`` is the sample of each token, ``order_R`` its number inside its sample's response.
    """

    row_R: Tensor
    order_R: Tensor
    n_rows: int
    """B."""
    n_orders: int
    """Scored tokens of the longest response."""

    @cached_property
    def place_R(self) -> Tensor:
        """The number of each token if all responses were as long as the longest, int64 ``[R]``."""
        return self.row_R * self.n_orders + self.order_R

    @cached_property
    def is_of_BR(self) -> Tensor:
        """1 where a token is of a sample, float64 ``[B, R]``."""
        return (self.row_R == torch.arange(self.n_rows, device=self.row_R.device)[:, None]).double()

    def by_sample(self, x_RM: Tensor) -> Tensor:
        """The sum over the tokens of each sample, float64 ``[B, M]``, of float64 ``[R, M]``; in the same order every
        time, which on a GPU takes a matrix product."""
        if x_RM.is_cuda:
            return self.is_of_BR @ x_RM
        return x_RM.new_zeros(self.n_rows, x_RM.shape[1]).index_add_(0, self.row_R, x_RM)


@dataclass(frozen=True, kw_only=True)
class ScoredTokens(Responses):
    """The response tokens of a batch, and where they are predicted.

    ``position_R`` is where token y_t is predicted, as an index into the flattened ``[B · T]`` positions.
    """

    position_R: Tensor
    target_R: Tensor
    length: int
    """T, the padded length of the batch."""
    first: int = 0
    """Number of the first of them, where tokens of several processes meet in a layer."""
    n_met: int | None = None
    """Scored tokens that meet there; None if they are these."""

    @property
    def n_numbers(self) -> int:
        """How many numbers there are: tokens have the numbers 0 … n - 1."""
        return len(self.position_R) if self.n_met is None else self.n_met

    @property
    def n_bits(self) -> int:
        """Binary digits of these numbers."""
        return max(1, (self.n_numbers - 1).bit_length())

    @cached_property
    def own_numbers(self) -> Tensor:
        """The numbers of these, int64 ``[R]``."""
        return self.first + torch.arange(len(self.position_R), device=self.position_R.device)

    @cached_property
    def number_T(self) -> Tensor:
        """The number of the scored token that each position predicts, int64 ``[B · T]``; -1 where none is scored."""
        n_positions, device = self.n_rows * self.length, self.position_R.device
        number_T = torch.full((n_positions,), -1, dtype=torch.int64, device=device)
        number_T[self.position_R] = self.own_numbers
        return number_T

    @cached_property
    def kept(self) -> dict[Hashable, Any]:
        """What is the same in all layers that these tokens come to, by who has made it and of what."""
        return {}


@dataclass(frozen=True)
class ExpertScores:
    """Contributions of one kind of experts of one layer; a row is one token in one expert.

    ``rank_S[s]`` in ``0 … rows_per_token - 1`` orders a token's rows by expert.
    """

    rows: Contributions
    token_S: Tensor
    """Number of the scored token of each row, int64 ``[S]``."""
    expert_S: Tensor
    """Number of the expert in the layer, int64 ``[S]``."""
    rank_S: Tensor
    rows_per_token: int
    first_expert: int = 0
    """Number in the layer of the first of these experts, all of which have the same width."""
    first_neuron: int = 0
    """Number in the layer of its first neuron."""

    @property
    def first_neuron_S(self) -> Tensor:
        """Number in the layer of the first neuron of each row's expert, int64 ``[S]``."""
        return self.first_neuron + (self.expert_S - self.first_expert) * self.rows.width


@dataclass(frozen=True)
class LayerScores:
    """All contributions of one layer to the response tokens of one batch."""

    parts: tuple[ExpertScores, ...]
    made_R: Tensor | None = None
    """Σ f over all neurons of the layer, those of other processes included, float64 ``[R]`` of the tokens of this
    process; only where it was asked for."""
    output_R: Tensor | None = None
    """What that must be equal to: ⟨output of the layer, readout⟩, less what no neuron made of it (output biases,
    experts that pass their input on)."""


def rank_of_row(token_S: Tensor, expert_S: Tensor, n_experts: int) -> Tensor:
    """The number of each row among those of its token, by expert, int64 ``[S]``."""
    pair_S, order_S = (token_S * n_experts + expert_S).sort(stable=True)
    rank_S = torch.empty_like(order_S)
    rank_S[order_S] = number_among_equals(pair_S // n_experts)
    return rank_S


def number_among_equals(sorted_S: Tensor) -> Tensor:
    """How many equal ones come before each of some numbers, which ascend, int64 ``[S]``."""
    return torch.arange(len(sorted_S), device=sorted_S.device) - torch.searchsorted(sorted_S, sorted_S)


def rank_of_pair(token_S: Tensor, expert_S: Tensor, n_tokens: int, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same as `rank_of_row`, but equal for rows that repeat another's token and expert, int64 ``[S]``; how many
    different ones a token has at most, and how many rows are repeated, int64 scalars.

    Nothing is sorted; memory is 8 bytes for each token and expert.
    """
    is_there_RE = torch.zeros(n_tokens, n_experts, dtype=torch.int32, device=token_S.device)
    is_there_RE[token_S, expert_S] = torch.ones_like(token_S, dtype=torch.int32)  # for a number the host would wait
    n_so_far_RE = is_there_RE.cumsum(1, dtype=torch.int32)
    n_R = torch.nn.functional.pad(n_so_far_RE[:, -1].long(), (0, 1))  # one more, for there may be no tokens
    return n_so_far_RE[token_S, expert_S].long() - 1, n_R.max(), len(token_S) - n_R.sum()


def add_conserved(sum_R: Tensor, part: ExpertScores) -> None:
    """Add Σ f over the neurons of some experts to the sum of each token, float64 ``[R]``.

    Over all neurons of the layer that is ⟨output, readout⟩ less what no neuron made, up to rounding, for any
    architecture, exactly when the right tensors were read.
    """
    sum_R.index_add_(0, part.token_S, part.rows.sums())


def identity_error(scores: LayerScores) -> Tensor:
    """‖Σ f - output‖ / ‖output‖ over the tokens of this process, float64 scalar.

    Tokens whose output is not finite are left out. NaN where the output is zero.
    """
    assert scores.made_R is not None
    assert scores.output_R is not None
    return relative_error(scores.made_R, scores.output_R)


def relative_error(found_R: Tensor, expected_R: Tensor) -> Tensor:
    """‖found - expected‖ / ‖expected‖, a scalar; entries that are not finite in either are left out."""
    difference_R = found_R - expected_R
    is_finite_R = difference_R.isfinite()
    error: Tensor = torch.linalg.vector_norm(difference_R.where(is_finite_R, 0)) / torch.linalg.vector_norm(
        expected_R.where(is_finite_R, 0)
    )
    return error

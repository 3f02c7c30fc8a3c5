"""Rows of experts that are read where they call their down projection, however it is known which token they are for.

Shapes: P rows that go to scored tokens, U of these that are left when several of one token in one expert are one, W =
neurons of one down projection, S = P·n rows where each holds n experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mui_callback.experts.base import First
from mui_callback.scoring.contributions import ExpertScores, rank_of_pair
from mui_callback.scoring.rows import Contributions


@dataclass(frozen=True)
class CalledRows:
    """A row is one token in one down projection."""

    token_P: Tensor
    """Number of the scored token, int64 ``[P]``."""
    down_P: Tensor
    """Number of the down projection in the layer, int64 ``[P]``."""
    rank_P: Tensor
    """Number of the row among those of its token, by down projection, int64 ``[P]``."""
    rows_per_token: int
    are_repeated: bool = False
    """Whether one was called for a token more than once."""
    _rows_of_experts: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict, init=False)

    @classmethod
    def ranked(
        cls, token_P: Tensor, down_P: Tensor, n_tokens: int, n_downs: int, asked: Tensor
    ) -> tuple[CalledRows, list[int]]:
        """Rows in any order, and the values of another tensor, with one wait for the device.

        Args:
            token_P: see `CalledRows`.
            down_P: see `CalledRows`.
            n_tokens: more than the highest token.
            n_downs: more than the highest down projection.
            asked: int64 ``[n]``, whose values are wanted on the host.
        """
        rank_P, most, n_repeated = rank_of_pair(token_P, down_P, n_tokens, n_downs)
        rows_per_token, n_repeats, *values = torch.cat([torch.stack([most, n_repeated]), asked]).tolist()
        return cls(token_P, down_P, rank_P, max(rows_per_token, 1), are_repeated=n_repeats > 0), values

    def scores(self, rows: Contributions, first: First, *, n_downs: int, experts_of_down: int) -> ExpertScores:
        """The contributions of these rows as those of experts.

        Args:
            rows: the contributions, ``[P, W]``.
            first: what the experts of the layer begin with.
            n_downs: down projections of the layer.
            experts_of_down: experts that one holds side by side.
        """
        if self.are_repeated:
            united, rows = self._united(rows, n_downs)
            return united.scores(rows, first, n_downs=n_downs, experts_of_down=experts_of_down)
        n, width = experts_of_down, rows.width // experts_of_down
        token_S, expert_S, rank_S = self._of_experts(n, first.expert)
        if n > 1:
            rows = Contributions(
                rows.act.reshape(-1, width),
                rows.projected_SI.reshape(-1, width),
                rows.weight_S.repeat_interleave(n) if rows.weight_S is not None else None,
                act_row_S=_side_by_side(rows.act_row_S, n) if rows.act_row_S is not None else None,
                is_lent=rows.is_lent,
            )
        return ExpertScores(
            rows,
            token_S,
            expert_S,
            rank_S=rank_S,
            rows_per_token=self.rows_per_token * n,
            first_expert=first.expert,
            first_neuron=first.neuron,
        )

    def _of_experts(self, n: int, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """Token, expert and rank of each row, where each down projection holds n experts; kept, for other layers."""
        if (n, first) not in self._rows_of_experts:
            down_P, token_P, rank_P = self.down_P, self.token_P, self.rank_P
            if n > 1:
                down_P, rank_P = _side_by_side(down_P, n), _side_by_side(rank_P, n)
                token_P = token_P.repeat_interleave(n)
            self._rows_of_experts[n, first] = token_P, first + down_P if first else down_P, rank_P
        return self._rows_of_experts[n, first]

    def _united(self, rows: Contributions, n_downs: int) -> tuple[CalledRows, Contributions]:
        """One row for all calls of a down projection for a token."""
        pair_U, row_P = torch.unique(self.token_P * n_downs + self.down_P, return_inverse=True)
        score_PW = rows.all()  # what is not finite stays so when it is added up
        score_UW = score_PW.new_zeros(len(pair_U), rows.width).index_add_(0, row_P, score_PW)
        token_U, down_U = pair_U // n_downs, pair_U % n_downs
        rank_U, most, _ = rank_of_pair(token_U, down_U, int(token_U[-1]) + 1, n_downs)
        return (
            CalledRows(token_U, down_U, rank_U, int(most)),
            Contributions(score_UW, torch.ones_like(score_UW)),
        )


def _side_by_side(number_P: Tensor, n: int) -> Tensor:
    """Each number as those of n parts."""
    return (number_P[:, None] * n + torch.arange(n, device=number_P.device)).flatten()

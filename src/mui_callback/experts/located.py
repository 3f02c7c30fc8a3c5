"""Which rows of recorded calls go to scored tokens.

Shapes: S rows of all calls, P of these that go to scored tokens, R scored tokens, e experts of all calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mui_callback.experts.called_rows import CalledRows
from mui_callback.experts.calls import Call, activations
from mui_callback.experts.tail import Tail
from mui_callback.scoring.contributions import ScoredTokens


@dataclass(frozen=True)
class Located:
    """The rows of all calls, one call after the other, that go to scored tokens."""

    rows: CalledRows
    place_P: Tensor
    """Number of each row among those of all calls, int64 ``[P]``."""
    bounds: list[int]
    """Where the rows of each call begin in these, and where those of the last one end."""

    def of_call(self, number: int, first_row: int) -> Tensor:
        """The places of the rows of one call, counted in this call."""
        return self.place_P[self.bounds[number] : self.bounds[number + 1]] - first_row


def at_positions(calls: Sequence[Call], tokens: ScoredTokens) -> Located:
    """Where each expert sees every position: nothing has to be asked of the device."""
    n_positions, device = tokens.n_rows * tokens.length, tokens.position_R.device
    n_experts = [call.product.n_experts for call in calls]
    experts = [call.first_expert + number for call in calls for number in range(call.product.n_experts)]
    offset_e = n_positions * torch.arange(len(experts), device=device)
    place_P = tokens.position_R if len(experts) == 1 else (offset_e[:, None] + tokens.position_R).flatten()
    bounds = [len(tokens.position_R) * n for n in np.cumsum([0, *n_experts]).tolist()]
    return Located(rows_at_positions(experts, tokens), place_P, bounds)


def rows_at_positions(experts: Sequence[int], tokens: ScoredTokens) -> CalledRows:
    """The rows of all scored tokens in each of some experts, one expert after the other.

    Args:
        experts: their numbers in the layer.
        tokens: the scored tokens.
    """
    key = (rows_at_positions, *experts)
    if key not in tokens.kept:
        tokens.kept[key] = _rows_at_positions(experts, tokens)
    rows: CalledRows = tokens.kept[key]
    return rows


def _rows_at_positions(experts: Sequence[int], tokens: ScoredTokens) -> CalledRows:
    token_R = tokens.own_numbers
    if len(experts) == 1:  # most often, and without a wait for the device
        return CalledRows(token_R, torch.full_like(token_R, experts[0]), torch.zeros_like(token_R), rows_per_token=1)
    expert_e = torch.tensor(experts, device=token_R.device)
    return CalledRows(
        token_R.repeat(len(experts)),
        expert_e.repeat_interleave(len(token_R)),
        expert_e.argsort().argsort().repeat_interleave(len(token_R)),
        rows_per_token=len(experts),
    )


def at_tokens(
    calls: Sequence[Call], first_rows: list[int], tail: Tail, *, n_tokens: int, n_downs: int, is_routed: bool
) -> Located:
    """Where the tail has told the token of each row.

    Args:
        calls: the calls.
        first_rows: where the rows of each begin among those of all, and where the last ones end.
        tail: who told.
        n_tokens: how many tokens there are.
        n_downs: down projections of the layer.
        is_routed: whether tokens are sent to the experts.

    Raises:
        ProbeError: see `Tail.raise_if_mixed`.
    """
    token_S = torch.cat([call.cut.token_S for call in calls if call.cut.token_S is not None])
    is_row_S = token_S >= 0
    if is_routed and any(call.product.n_experts > 1 for call in calls):
        # All experts ran on all tokens at once; those that were not chosen for a token had zeros as input.
        is_row_S &= torch.cat([(activations(call.product, None, "product") != 0).any(-1) for call in calls])
    (place_P,) = torch.nonzero(is_row_S, as_tuple=True)
    bounds = torch.searchsorted(place_P, torch.tensor(first_rows, device=place_P.device))
    is_mixed = place_P.new_zeros(1) if tail.is_mixed is None else tail.is_mixed.long()[None]
    expert_P = torch.cat([call.expert_S for call in calls])[place_P]
    rows, (*found, mixed) = CalledRows.ranked(
        token_S[place_P], expert_P, n_tokens, n_downs, torch.cat([bounds, is_mixed])
    )
    tail.raise_if_mixed(is_mixed=bool(mixed))
    return Located(rows, place_P, found)

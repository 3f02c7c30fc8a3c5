"""Pairs of scored tokens and their experts, against a loop over them."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mui_callback.experts.pairs import Pairs


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_pairs_are_sorted_by_expert_and_ranked_in_their_token(seed: int, top_k: int, n_none: int) -> None:
    """Ids of as many as there are experts and more stand for none."""
    n_rows, n_local, random = 9, 5, torch.Generator().manual_seed(seed)
    expert_TK = torch.stack([torch.randperm(n_local + n_none, generator=random)[:top_k] for _ in range(n_rows)])
    weight_TK = torch.rand(n_rows, top_k, generator=random, dtype=torch.float64)
    row_TK = torch.randperm(n_rows * top_k, generator=random).view(n_rows, top_k)
    place_R = torch.randperm(n_rows, generator=random)[:6].sort().values
    pairs = Pairs.of(place_R, expert_TK, weight_TK, row_TK, n_local)

    expected = []
    for r, place in enumerate(place_R.tolist()):
        chosen = expert_TK[place].tolist()
        for k, expert in enumerate(chosen):
            rank, own = sorted(chosen).index(expert), (int(row_TK[place, k]), float(weight_TK[place, k].float()))
            expected.append((min(expert, n_local - 1), r, rank, *own, expert < n_local))
    is_row_P = torch.ones_like(pairs.from_P, dtype=torch.bool) if pairs.is_row_P is None else pairs.is_row_P
    fields = (pairs.expert_P, pairs.from_P, pairs.rank_P, pairs.row_P, pairs.weight_P, is_row_P)
    found = list(zip(*(field.tolist() for field in fields), strict=True))
    assert sorted(found) == sorted(expected)
    assert [expert for expert, *_ in found] == sorted(expert for expert, *_ in expected)
    assert (pairs.is_row_P is None) == all(is_row for *_, is_row in expected)

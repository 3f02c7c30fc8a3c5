"""Rows of down projections that are called for a token more than once, against loops."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mui_callback.experts.base import First
from mui_callback.experts.called_rows import CalledRows
from mui_callback.scoring.rows import NOTHING, Contributions

N_TOKENS, N_DOWNS, WIDTH = 3, 4, 6


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, N_TOKENS - 1), st.integers(0, N_DOWNS - 1)), min_size=1, max_size=12),
    st.integers(0, 2**31),
    st.booleans(),
    st.sampled_from([1, 2, 3]),
)
def test_calls_for_one_token_are_one_row(pairs: list[tuple[int, int]], seed: int, is_weighted: bool, n: int) -> None:
    random = torch.Generator().manual_seed(seed)
    act, projected = torch.randn(2, len(pairs), WIDTH, generator=random).unbind(0)
    act[0, 0] = math.nan
    weight = torch.rand(len(pairs), generator=random) if is_weighted else None
    order = torch.randperm(len(pairs), generator=random)  # where the activations of each row are
    token_P, down_P = torch.tensor(pairs).unbind(1)
    called, _ = CalledRows.ranked(token_P, down_P, N_TOKENS, N_DOWNS, torch.zeros(0, dtype=torch.int64))
    assert called.are_repeated == (len(set(pairs)) < len(pairs))

    expected: dict[tuple[int, int], torch.Tensor] = defaultdict(lambda: torch.zeros(WIDTH))
    for row, pair in enumerate(pairs):
        expected[pair] = expected[pair] + act[order[row]] * projected[row] * (1 if weight is None else weight[row])
    contributions = Contributions(act, projected, weight, act_row_S=order)
    found = called.scores(contributions, First(5, 50), n_downs=N_DOWNS, experts_of_down=n)
    keys = list(zip(found.token_S.tolist(), (found.expert_S - 5).tolist(), strict=True))
    assert sorted(keys) == sorted((token, down * n + part) for token, down in expected for part in range(n))
    for (token, expert), rank, score in zip(keys, found.rank_S.tolist(), found.rows.all(), strict=True):
        value = expected[token, expert // n].view(n, -1)[expert % n]
        torch.testing.assert_close(score, value.nan_to_num(nan=NOTHING))
        assert rank == sum(other == token and before < expert for other, before in keys)
        assert rank < found.rows_per_token
    assert int(found.rows.summary().n_not_finite) == 1
    assert (found.first_neuron_S - 50).tolist() == [expert * (WIDTH // n) for _, expert in keys]

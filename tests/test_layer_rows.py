"""The rows of several kinds of experts as one, against brute force over the contributions of each kind."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mui_callback.scoring.contributions import ExpertScores
from mui_callback.scoring.layer_rows import LayerRows
from mui_callback.scoring.rows import CHUNK, Contributions

VALUES = [-3.0, -2.0, -0.5, -1.0, math.nan, math.inf]
"""Mostly below zero, so that nothing that is made up passes for the highest."""


@st.composite
def kinds(draw: st.DrawFn) -> tuple[list[ExpertScores], list[np.ndarray]]:
    """Kinds of experts, some without rows, and the contributions of each; NaN in what is no row."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    widths = draw(st.lists(st.sampled_from([1, 63, 64, 65, 130, 200]), min_size=1, max_size=4))
    parts, naive = [], []
    for width in widths:
        n_tokens, n_experts = draw(st.sampled_from([(0, 1), (1, 1), (3, 2)]))
        pairs = rng.permutation([(t, e) for t in range(n_tokens) for e in range(n_experts)]).reshape(-1, 2)
        act = rng.choice(VALUES, (len(pairs), width), p=[0.3, 0.25, 0.2, 0.2, 0.03, 0.02])
        projected = rng.choice([0.5, 2.0], act.shape)
        weight = rng.choice([0.25, 1.0], len(pairs)) if draw(st.booleans()) else None
        is_row = rng.random(len(pairs)) < 0.6 if draw(st.booleans()) else None
        f = act * projected * (1.0 if weight is None else weight[:, None])
        naive.append(f if is_row is None else np.where(is_row[:, None], f, np.nan))
        rows = Contributions(
            torch.from_numpy(act).float(),
            torch.from_numpy(projected).bfloat16(),
            None if weight is None else torch.from_numpy(weight).float(),
            None if is_row is None else torch.from_numpy(is_row),
        )
        token, expert = torch.from_numpy(pairs).unbind(1)
        parts.append(ExpertScores(rows, token, expert + 10 * len(parts), expert * width, expert, n_experts))
    return parts, naive


@given(kinds())
@settings(max_examples=80, deadline=None)
def test_rows_behind_one_another_are_those_of_each_kind(made: tuple[list[ExpertScores], list[np.ndarray]]) -> None:
    parts, naive = made
    rows = LayerRows.of(parts)
    assert rows.n_rows == len(rows.token_S) == sum(map(len, naive))
    assert rows.n_chunks == max(math.ceil(part.rows.width / CHUNK) for part in parts)
    is_row = [
        np.ones(len(f), bool) if part.rows.is_row_S is None else part.rows.is_row_S.numpy()
        for part, f in zip(parts, naive, strict=True)
    ]
    if rows.is_row_S is None:
        assert all(part.rows.is_row_S is None for part in parts)
    else:
        assert rows.is_row_S.tolist() == np.concatenate(is_row).tolist()
    n_bad = sum(int((~np.isfinite(f[counts])).sum()) for f, counts in zip(naive, is_row, strict=True))
    assert int(rows.n_not_finite) == n_bad

    number = 0
    for part, f in zip(parts, naive, strict=True):
        for s, one in enumerate(f):
            entries = [float(value) if math.isfinite(value) else -math.inf for value in one]
            entries += [-math.inf] * (CHUNK * rows.n_chunks - len(entries))
            chunks = [entries[start : start + CHUNK] for start in range(0, len(entries), CHUNK)]
            assert rows.highest_SC[number].tolist() == [max(chunk) for chunk in chunks]
            found = rows.of_chunks(torch.full((rows.n_chunks,), number), torch.arange(rows.n_chunks))
            assert found.tolist() == chunks
            assert float(rows.mass_S[number]) == pytest.approx(sum(abs(e) for e in entries if e > -math.inf))
            for name in ("token_S", "expert_S", "first_neuron_S"):
                assert getattr(rows, name)[number] == getattr(part, name)[s]
            number += 1


@given(kinds())
@settings(max_examples=40, deadline=None)
def test_the_rows_of_a_token_are_ordered_by_kind_and_expert(made: tuple[list[ExpertScores], list[np.ndarray]]) -> None:
    rows = LayerRows.of(made[0])
    assert not len(rows.rank_S) or 0 <= int(rows.rank_S.min()) <= int(rows.rank_S.max()) < rows.rows_per_token
    for token in rows.token_S.unique().tolist():
        of_token = rows.token_S == token
        ranks, experts = rows.rank_S[of_token].tolist(), rows.expert_S[of_token].tolist()
        assert len(set(ranks)) == len(ranks)
        assert [e for _, e in sorted(zip(ranks, experts, strict=True))] == sorted(experts)

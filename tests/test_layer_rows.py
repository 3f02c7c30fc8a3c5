"""The rows of several kinds of experts as one, against brute force over the contributions of each kind."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mui_callback.scoring.contributions import ExpertScores, Responses
from mui_callback.scoring.layer_rows import LayerRows
from mui_callback.scoring.rows import CHUNK, Contributions
from mui_callback.scoring.topk import Candidates

VALUES = [-3.0, -2.0, -0.5, -1.0, math.nan, math.inf]
"""Mostly below zero, so that nothing that is made up passes for the highest."""


@st.composite
def kinds(draw: st.DrawFn) -> tuple[list[ExpertScores], Responses, list[np.ndarray]]:
    """Kinds of experts, some without rows, and the contributions of each; NaN in what is no row."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lengths = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    n_tokens, parts, naive, n_experts, n_neurons = sum(lengths), [], [], 0, 0
    for width in draw(st.lists(st.sampled_from([1, 63, 64, 65, 130, 200]), min_size=1, max_size=4)):
        n = draw(st.integers(1, 2))
        share = draw(st.sampled_from([0.0, 0.7, 1.0]))
        pairs = [(t, e) for t in range(n_tokens) for e in range(n) if rng.random() < share]
        pairs = rng.permutation(pairs).reshape(-1, 2).astype(np.int64)
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
        parts.append(ExpertScores(rows, token, expert + n_experts, expert, n, n_experts, n_neurons))
        n_experts, n_neurons = n_experts + n, n_neurons + n * width
    responses = Responses(
        row_R=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        order_R=torch.tensor([order for length in lengths for order in range(length)]),
        n_rows=len(lengths),
        n_orders=max(lengths),
    )
    return parts, responses, naive


def of_another_layer(parts: list[ExpertScores]) -> list[ExpertScores]:
    """That is alike, with other contributions."""
    return [replace(part, rows=replace(part.rows, act=-2 * part.rows.act)) for part in parts]


@given(kinds())
@settings(max_examples=80, deadline=None)
def test_what_is_found_of_a_layer_is_what_a_loop_finds(
    made: tuple[list[ExpertScores], Responses, list[np.ndarray]],
) -> None:
    parts, responses, naive = made
    n_experts = max(part.first_expert + part.rows_per_token for part in parts)
    rows = LayerRows.of([of_another_layer(parts), parts], responses, n_experts)
    n_ranks, n_chunks = sum(part.rows_per_token for part in parts), max(part.rows.n_chunks for part in parts)
    n_slots = responses.n_orders * n_ranks
    highest = np.full((responses.n_rows, n_slots, 1 + n_chunks), -math.inf)
    use = np.zeros((len(responses.row_R), n_experts, 2))
    n_bad, number = 0, 0
    for part, f in zip(parts, naive, strict=True):
        for s, one in enumerate(f):
            token, expert = int(part.token_S[s]), int(part.expert_S[s])
            sample, order = int(responses.row_R[token]), int(responses.order_R[token])
            counts = part.rows.is_row_S is None or bool(part.rows.is_row_S[s])
            entries = [float(value) if math.isfinite(value) else -math.inf for value in one]
            n_bad += counts * entries.count(-math.inf)
            use[token, expert] += counts * np.array([sum(abs(e) for e in entries if e > -math.inf), 1])
            chunks = [entries[start : start + CHUNK] for start in range(0, len(entries), CHUNK)]
            slot = order * n_ranks + expert  # each token has as many slots as there are experts, in their order
            highest[sample, slot, : 1 + len(chunks)] = [max(entries), *map(max, chunks)]
            assert int(rows.found.row_LBP[1, sample, slot]) == number
            score, neuron = rows.of_chunks(1, torch.full((n_chunks,), number), torch.arange(n_chunks))
            padded = [*entries, *[-math.inf] * (CHUNK * n_chunks - len(entries))]
            assert score.flatten().tolist() == padded
            first = part.first_neuron + (expert - part.first_expert) * part.rows.width
            assert neuron.tolist() == [first + CHUNK * chunk for chunk in range(n_chunks)]
            number += 1
    assert np.array_equal(rows.found.highest_LBPC[1].numpy(), highest)
    assert rows.highest_LB[1].tolist() == highest.max((1, 2)).tolist()
    assert rows.found.use_RLE2[:, 1, :-1].numpy() == pytest.approx(use)
    assert int(rows.found.n_not_finite) == 2 * n_bad
    of_samples = [use[responses.row_R.numpy() == sample].sum(0) for sample in range(responses.n_rows)]
    other, own = rows.use(responses).unflatten(1, (2, n_experts)).unbind(1)
    assert own.numpy() == pytest.approx(np.stack(of_samples))
    assert torch.equal(other, own * torch.tensor([2.0, 1.0]))


@given(kinds(), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_the_finalists_hold_the_highest_entries(
    made: tuple[list[ExpertScores], Responses, list[np.ndarray]], k: int
) -> None:
    parts, responses, naive = made
    n_neurons = max(part.first_neuron + part.rows_per_token * part.rows.width for part in parts)
    both = LayerRows.of([of_another_layer(parts), parts], responses, 99).finalists(k, n_neurons).entries(k)
    found = Candidates(both.score[responses.n_rows :], both.place[responses.n_rows :])
    entries: list[list[tuple[float, int]]] = [[] for _ in range(responses.n_rows)]
    for part, f in zip(parts, naive, strict=True):
        for token, expert, one in zip(part.token_S.tolist(), part.expert_S.tolist(), f, strict=True):
            first = int(responses.order_R[token]) * n_neurons + part.first_neuron
            first += (expert - part.first_expert) * part.rows.width
            entries[int(responses.row_R[token])] += [(v, first + j) for j, v in enumerate(one) if math.isfinite(v)]
    for sample, own in enumerate(entries):
        best = sorted(own, key=lambda entry: (-entry[0], entry[1]))[:k]
        assert found.score[sample].tolist() == [v for v, _ in best] + [-math.inf] * (k - len(best))
        assert found.place[sample, : len(best)].tolist() == [place for _, place in best]

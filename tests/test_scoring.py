"""Selection, merging and bit sets, against sorting in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mui_callback.experts.codewords import codewords, read_codewords
from mui_callback.probe import head
from mui_callback.rules import Rule
from mui_callback.scoring import rows as rows_module
from mui_callback.scoring.rows import Contributions
from mui_callback.scoring.topk import Candidates, merge_candidates, ordered_topk

# Few distinct values, so that ties are the rule; both zeros, which are equal; entries that do not count.
scores = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 0.5, 1.0, 2.0**127, float("-inf")])

logits = st.sampled_from([-2.0, 0.0, -0.0, 1.0, 3.0])


def best(entries: list[tuple[float, int]], k: int) -> list[tuple[float, int]]:
    """The k highest (score, place), the lower place first among equals; those that do not count left out."""
    return sorted((e for e in entries if e[0] > -math.inf), key=lambda entry: (-entry[0], entry[1]))[:k]


def listed(found: Candidates, sample: int) -> list[tuple[float, int]]:
    pairs = zip(found.score[sample].tolist(), found.place[sample].tolist(), strict=True)
    return [(score, place) for score, place in pairs if score > -math.inf]


@given(st.lists(st.lists(scores, min_size=7, max_size=7), min_size=1, max_size=4), st.integers(1, 9))
def test_ordered_topk_is_a_stable_sort(rows: list[list[float]], k: int) -> None:
    found = ordered_topk(torch.tensor(rows), k)
    for row, indices in zip(rows, found.tolist(), strict=True):
        assert indices == sorted(range(7), key=lambda i: (-row[i], i))[:k]


@given(st.lists(st.tuples(st.lists(logits, min_size=5, max_size=5), st.integers(0, 4)), max_size=6), st.integers(1, 4))
def test_losses_and_first_choices_are_those_of_a_loop(rows: list[tuple[list[float], int]], at_once: int) -> None:
    logits_RV = torch.tensor([own for own, _ in rows]).reshape(len(rows), 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "_ROWS_AT_ONCE", at_once)
        loss_R, is_correct_R = head.token_losses(logits_RV, torch.tensor([target for _, target in rows]).long())
    assert is_correct_R.tolist() == [own.index(max(own)) == target for own, target in rows]
    expected = [math.log(sum(math.exp(value - own[target]) for value in own)) for own, target in rows]
    assert loss_R.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@given(st.lists(st.lists(scores, min_size=0, max_size=6), min_size=1, max_size=4), st.integers(1, 8))
def test_merging_parts_equals_selecting_from_the_whole(parts: list[list[float]], k: int) -> None:
    places = iter(range(100, 0, -1))  # later parts have lower places
    entries = [[(score, next(places)) for score in part] for part in parts]
    candidates = []
    for part in entries:
        chosen = best(part, k)
        padding = [(-math.inf, 0)] * (k - len(chosen))
        score, place = zip(*(chosen + padding), strict=True)
        candidates.append(Candidates(torch.tensor([score]), torch.tensor([place])))
    merged = merge_candidates(candidates, k)
    assert listed(merged, 0) == best([entry for part in entries for entry in part], k)


def test_a_rule_takes_a_thousandth_rounded_down_and_at_least_one() -> None:
    rule = Rule.parse("top_fraction=0.001")
    assert [rule.n_entries(n) for n in (1, 999, 1000, 1999, 3000, 65536)] == [1, 1, 1, 1, 3, 65]
    assert Rule.parse("top_fraction=1").n_entries(7) == 7


def rows_of(data: st.DataObject) -> tuple[Contributions, np.ndarray]:
    """Rows, and their products by a naive loop: NaN and infinity where a factor is, NaN where there is no row."""
    n_rows, width = data.draw(st.integers(0, 5)), data.draw(st.sampled_from([1, 63, 64, 65, 200]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    act, projected = (
        rng.choice([-2.0, -0.5, 0.0, 1.5, np.inf, np.nan], (n_rows, width), p=[0.3, 0.2, 0.2, 0.28, 0.01, 0.01])
        for _ in range(2)
    )
    weight = rng.choice([-1.0, 0.0, 0.25], n_rows) if data.draw(st.booleans()) else None
    is_row = rng.random(n_rows) < 0.7 if data.draw(st.booleans()) else None
    naive = np.full((n_rows, width), -np.inf)
    for s in range(n_rows):
        for j in range(width):
            with np.errstate(invalid="ignore"):
                f = act[s, j] * projected[s, j] * (1.0 if weight is None else weight[s])
            if is_row is None or is_row[s]:
                naive[s, j] = f
    act_row = rng.permutation(n_rows + 3)[:n_rows] if data.draw(st.booleans()) else None
    if act_row is not None:  # among rows of others
        own, act = act, np.full((n_rows + 3, width), 7.0)
        act[act_row] = own
    contributions = Contributions(
        torch.from_numpy(act).float(),
        torch.from_numpy(projected).bfloat16(),
        None if weight is None else torch.from_numpy(weight).float(),
        None if is_row is None else torch.from_numpy(is_row),
        None if act_row is None else torch.from_numpy(act_row),
    )
    return contributions, naive


@given(st.data(), st.sampled_from([1, 150, 2**24]))
@settings(max_examples=60, deadline=None)
def test_one_pass_finds_what_a_loop_finds(data: st.DataObject, at_once: int) -> None:
    rows, naive = rows_of(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "_IN_CACHE", at_once)
        summary, sums = rows.summary(), rows.sums()
    is_row = np.ones(rows.n_rows, dtype=bool) if rows.is_row_S is None else rows.is_row_S.numpy()
    assert int(summary.n_not_finite) == int((~np.isfinite(naive[is_row])).sum())
    finite = np.where(np.isfinite(naive), naive, 0.0)
    assert summary.mass_S.tolist() == pytest.approx(np.abs(finite).sum(1).tolist())
    assert sums.tolist() == pytest.approx(finite.sum(1).tolist())
    assert summary.highest_SC.shape == (rows.n_rows, rows.n_chunks)
    counted = np.where(np.isfinite(naive), naive, -np.inf)
    assert np.array_equal(rows.all().numpy(), counted.astype(np.float32))
    for s in range(rows.n_rows):
        for c in range(rows.n_chunks):
            chunk = counted[s, 64 * c : 64 * (c + 1)]
            assert float(summary.highest_SC[s, c]) == max(chunk)
            found = rows.of_chunks(torch.tensor([s]), torch.tensor([c]))[0].tolist()
            assert found == [*chunk.tolist(), *[-math.inf] * (64 - len(chunk))]


@given(st.lists(st.integers(-1, 300), min_size=1, max_size=20), st.sampled_from([0.25, -3.0, 1e-3]))
def test_codewords_are_read_whatever_their_weight(numbers: list[int], weight: float) -> None:
    number_T = torch.tensor(numbers)
    n_bits = 9
    words = codewords(number_T, n_bits, 24, torch.bfloat16) * weight
    found, is_word = read_codewords(words, n_bits)
    assert found.tolist() == numbers
    assert is_word.all()
    mixed = words + codewords(number_T + 1, n_bits, 24, torch.bfloat16) * weight  # of two tokens at once
    assert not read_codewords(mixed, n_bits)[1][number_T >= 0].any()

"""Selection, merging and bit sets, against sorting in plain Python."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mui_callback.counts import n_bytes, unpack, unpack_layers
from mui_callback.experts.tail import _codewords, _read_codewords
from mui_callback.scoring.contributions import contributions
from mui_callback.scoring.device_counts import pack
from mui_callback.scoring.select import key_entries_per_sample
from mui_callback.scoring.topk import Candidates, merge_candidates, ordered_topk, top_entries

# Few distinct values, so that ties are the rule; both zeros, which are equal; entries that do not count.
scores = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 0.5, 1.0, 2.0**127, float("-inf")])


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


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_top_entries_equal_a_sort_of_everything(data: st.DataObject) -> None:
    n_samples, n_slots = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    width, k = data.draw(st.sampled_from([1, 3, 64, 65, 150])), data.draw(st.integers(1, 7))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    rows = [(b, p) for b in range(n_samples) for p in range(n_slots) if rng.random() < 0.8]
    rng.shuffle(rows)
    values = rng.choice([-2.0, -1.0, 0.0, 0.5, 1.0, -np.inf], size=(len(rows), width)).astype(np.float32)
    found = top_entries(
        torch.from_numpy(values),
        torch.tensor([b for b, _ in rows], dtype=torch.int64),
        torch.tensor([p for _, p in rows], dtype=torch.int64),
        torch.tensor([1000 * p for _, p in rows], dtype=torch.int64),
        n_samples=n_samples,
        n_slots=n_slots,
        k=k,
    )
    assert found.score.shape == found.place.shape == (n_samples, k)
    for sample in range(n_samples):
        entries = [
            (float(value), 1000 * p + w)
            for (b, p), row in zip(rows, values, strict=True)
            if b == sample
            for w, value in enumerate(row)
        ]
        assert listed(found, sample) == best(entries, k)


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


@given(st.lists(st.lists(st.booleans(), min_size=13, max_size=13), min_size=1, max_size=3))
def test_packing_is_reversible(rows: list[list[bool]]) -> None:
    packed = pack(torch.tensor(rows)).numpy()
    assert packed.shape == (len(rows), n_bytes(13))
    assert unpack(packed, 13).tolist() == rows
    for row, bytes_ in zip(rows, packed.tolist(), strict=True):
        assert int.from_bytes(bytes(bytes_), "little") == sum(2**i for i, member in enumerate(row) if member)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_layers_are_unpacked_one_behind_the_other(sizes: list[int], random: Random) -> None:
    layers = [[random.random() < 0.5 for _ in range(size)] for size in sizes]
    packed = np.concatenate([pack(torch.tensor(layer)).numpy() for layer in layers])
    assert unpack_layers(packed, sizes).tolist() == [member for layer in layers for member in layer]


def test_k_is_a_thousandth_rounded_down_and_at_least_one() -> None:
    assert [key_entries_per_sample(n, 0.001) for n in (1, 999, 1000, 1999, 3000, 65536)] == [1, 1, 1, 1, 3, 65]
    assert key_entries_per_sample(7, 1.0) == 7


def test_contributions_are_products_in_float32() -> None:
    act, projected = torch.tensor([[2.0, -3.0]], dtype=torch.bfloat16), torch.tensor([[0.5, 4.0]])
    assert contributions(act, projected).tolist() == [[1.0, -12.0]]
    assert contributions(act, projected, torch.tensor([0.25])).tolist() == [[0.25, -3.0]]
    assert contributions(act, projected).dtype == torch.float32
    act = act.float()
    contributions(act, projected)
    assert act.tolist() == [[2.0, -3.0]]  # the input is left as it was


@given(st.lists(st.integers(-1, 300), min_size=1, max_size=20), st.sampled_from([0.25, -3.0, 1e-3]))
def test_codewords_are_read_whatever_their_weight(numbers: list[int], weight: float) -> None:
    number_T = torch.tensor(numbers)
    n_bits = 9
    words = _codewords(number_T, n_bits, 24).bfloat16() * weight
    found, is_word = _read_codewords(words, n_bits)
    assert found.tolist() == numbers
    assert is_word.all()
    mixed = words + _codewords(number_T + 1, n_bits, 24).bfloat16() * weight  # of two tokens at once
    assert not _read_codewords(mixed, n_bits)[1][number_T >= 0].any()

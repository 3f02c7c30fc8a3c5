"""How sequences are cut into rounds: against every way to cut them, and on lengths of real tasks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mui_callback.probe.batches import make_rounds
from mui_callback.probe.packing import packed
from mui_callback.probe.samples import TokenSample
from mui_callback.settings import ProbeSettings

Lengths = list[tuple[int, int]]

# Tokens of question and answer, at 3.5 characters each, of the first 200 test samples: every twentieth quantile.
GSM8K = [51, 74, 79, 87, 92, 99, 105, 111, 116, 123, 132, 144, 154, 164, 172, 183, 194, 209, 231, 252, 361]


def every_way(n: int) -> Iterator[list[range]]:
    for n_cuts in range(n):
        for cuts in combinations(range(1, n), n_cuts):
            edges = [0, *cuts, n]
            yield [range(a, b) for a, b in pairwise(edges)]


def batch_size(lengths: Lengths, pack: range, n_shards: int) -> tuple[int, int]:
    """Rows and positions of a batch."""
    rows = (len(pack) + n_shards - 1) // n_shards
    return rows, rows * (max(lengths[i][0] for i in pack) + max(lengths[i][1] for i in pack))


@given(
    st.lists(st.tuples(st.integers(1, 900), st.integers(0, 300)), min_size=1, max_size=7),
    st.integers(1, 4000),
    st.integers(1, 3),
)
def test_of_the_cheapest_ways_the_first_with_little_padding(lengths: Lengths, batch_tokens: int, n_shards: int) -> None:
    lengths.sort(key=sum)
    n_tokens = sum(map(sum, lengths))
    found: dict[tuple[range, ...], tuple[int, int]] = {}  # rounds and positions of a shard
    for way in every_way(len(lengths)):
        sizes = [batch_size(lengths, pack, n_shards) for pack in way]
        if all(rows == 1 or positions <= batch_tokens for rows, positions in sizes):
            found[tuple(way)] = len(way), sum(positions for _, positions in sizes)
    rounds = packed(lengths, batch_tokens, n_shards)
    assert tuple(rounds) in found

    def has_little_padding(way: tuple[range, ...]) -> bool:
        positions = found[way][1] * n_shards
        padding = positions - n_tokens
        return padding < positions / 10 or padding < 256 * n_shards

    price = batch_tokens
    while price:
        cost = {way: positions + price * n_rounds for way, (n_rounds, positions) in found.items()}
        cheapest = [way for way in cost if cost[way] == min(cost.values())]
        if tuple(rounds) in cheapest and (price == 1 or has_little_padding(tuple(rounds))):
            return
        # Of several that cost the same any may have been looked at.
        assert not all(map(has_little_padding, cheapest))
        price = price * 3 // 4
    raise AssertionError(f"not the cheapest for any price: {rounds}")


def test_nothing_is_cut_into_nothing() -> None:
    assert packed([], 9, 2) == []


@pytest.mark.parametrize("n_shards", [1, 2, 4, 8])
@pytest.mark.parametrize("n_samples", [200, 600])
def test_less_than_a_tenth_of_gsm8k_is_padding(n_samples: int, n_shards: int) -> None:
    """With the default `batch_tokens`."""
    places = np.linspace(0, len(GSM8K) - 1, n_samples)
    lengths = np.interp(places, range(len(GSM8K)), GSM8K).round().astype(int)
    samples = [TokenSample(str(i), np.ones(n, dtype=np.int64), np.arange(n) > 0) for i, n in enumerate(lengths)]
    rounds = make_rounds(samples, ProbeSettings.batch_tokens, n_shards)
    n_positions = sum(batch.input_ids.size for batches in rounds for batch in batches)
    assert 0 < n_positions - lengths.sum() < 0.1 * n_positions
    # Few passes nevertheless.
    assert len(rounds) <= max(9, 1.2 * lengths.sum() / (n_shards * ProbeSettings.batch_tokens))


def test_a_small_set_is_one_batch() -> None:
    lengths = [(n, 0) for n in (7, 9, 11, 14, 30)]
    assert packed(lengths, ProbeSettings.batch_tokens, 1) == [range(5)]

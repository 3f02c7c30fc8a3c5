"""What processes send each other, against the same in one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import collectives
from distributed_training import launch
from mui_callback.parallel.peers import Peers
from mui_callback.scoring.contributions import rank_of_pair, rank_of_row


@pytest.mark.parametrize("size", [2, 3])
def test_lists_are_put_together_and_vectors_added(size: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(size)
    lists = [rng.integers(-9, 2**40, n).tolist() for n in (3, 0, 5)[:size]]
    sums = rng.normal(size=(size, 5)).tolist()
    for seen in launch(tmp_path, collectives.collect, size=size, lists=lists, sums=sums):
        assert seen["gathered"].tolist() == [number for own in lists for number in own]
        assert seen["sum"].tolist() == pytest.approx(np.sum(sums, axis=0).tolist())
        assert seen["highest"].tolist() == np.max(sums, axis=0).tolist()
        longest = max(len(own) for own in lists)
        assert seen["sent_for_it"] == (size - 1) * 8 * (1 + longest)
        assert seen["sent"] == seen["sent_for_it"] + 2 * (2 * (size - 1) * 5 * 8 // size)


def test_rows_reach_whom_they_are_for(tmp_path: Path) -> None:
    n_rows = [[1, 0, 2], [0, 3, 1], [2, 2, 0]]
    for rank, seen in enumerate(launch(tmp_path, collectives.exchange, size=3, n_rows=n_rows)):
        assert seen["received"] == [10 * other + rank for other in range(3) for _ in range(n_rows[other][rank])]
        assert seen["sent"] == 16 * (sum(n_rows[rank]) - n_rows[rank][rank])


@pytest.mark.parametrize("kind", ["whole", "fsdp2", "zero3"])
@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((7, 3), [[0, 6, 3, 3], [2]]),
        ((7, 3), [[], [5, 4, 3]]),
        ((8, 2), [[1, 0], []]),
        ((1, 5), [[0], [0, 0]]),
    ],
)
def test_rows_of_a_matrix_that_is_spread(
    kind: str, shape: tuple[int, int], wanted: list[list[int]], tmp_path: Path
) -> None:
    seen = launch(tmp_path, collectives.rows, kind=kind, shape=shape, wanted=wanted)
    for process in seen:
        assert torch.equal(process["found"], process["expected"])
    # Nobody sends more than the different rows that the other one asks for.
    for rank, process in enumerate(seen):
        assert process["sent"] <= 4 * shape[1] * len(set(wanted[1 - rank]))
        assert kind != "whole" or process["sent"] == 0


def test_the_best_of_all_are_the_best_of_the_best_of_each(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 9, (2, 5, 6)).astype(float)  # with ties
    k, n_of_peer = 4, (3, 2)
    seen = launch(tmp_path, collectives.meet, scores=scores.tolist(), n_of_peer=n_of_peer, k=k)
    first = 0
    for process, n_own in zip(seen, n_of_peer, strict=True):
        for layer in process:
            for row in range(n_own):
                entries = [
                    (-scores[rank, first + row, column], 2 * column + rank) for rank in range(2) for column in range(6)
                ]
                found = list(zip((-layer.score[row]).tolist(), layer.place[row].tolist(), strict=True))
                values = [value for value, _ in sorted(entries)[:k]]
                assert [value for value, _ in found] == values
                assert set(found) <= set(entries)
        first += n_own


def test_who_is_alone_sends_nothing() -> None:
    peers, numbers, rows = Peers(), torch.tensor([3]), torch.ones(2, 2)
    peers.add(rows)
    peers.highest(rows)
    assert peers.exchange(rows, [2], [2]) is rows
    assert peers.gather(numbers) is numbers
    assert peers.traffic.sent == 0


def test_an_object_of_the_main_process_is_that_of_all(tmp_path: Path) -> None:
    for seen in launch(tmp_path, collectives.same_object):
        assert seen["rank"] == 0
        assert seen["array"].tolist() == [0, 1, 2]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=30, unique=True))
def test_rows_of_a_token_are_numbered_by_expert(pairs: list[tuple[int, int]]) -> None:
    token, expert = torch.tensor([*pairs, (9, 9)]).unbind(1)
    rank, most, n_repeated = (found.tolist() for found in rank_of_pair(token, expert, 10, 10))
    assert rank == rank_of_row(token, expert, 10).tolist()
    for (token_, expert_), rank_ in zip([*pairs, (9, 9)], rank, strict=True):
        assert rank_ == sum(1 for t, e in pairs if t == token_ and e < expert_)
    assert most == max(rank) + 1
    assert n_repeated == 0
    twice, most_of_twice, n_repeated = (
        found.tolist() for found in rank_of_pair(token.repeat(2), expert.repeat(2), 10, 10)
    )
    assert (twice, most_of_twice, n_repeated) == (rank * 2, most, len(rank))

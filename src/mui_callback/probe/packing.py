"""Which sequences share a forward pass: few passes, and little padding.

Shapes: N sequences, P prices of a round, W sequences that a round may begin with, R sequences of a round.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mui_callback.probe.samples import IntArray

PADDING = 0.1
"""Share of the positions that may be padding."""
_NOTHING = 256
"""Positions of padding, in all batches of a shard together, that are not worth another pass."""


def packed(
    lengths: Sequence[tuple[int, int]], batch_tokens: int, n_shards: int, padding: float = PADDING
) -> list[range]:
    """Cut sequences that are sorted by length into rounds.

    A round has a batch for each shard, all of one shape. Rows that some of them lack for it are padding, too. For each
    price of a round, in positions of a batch, there is a cheapest way to cut. Prices are `batch_tokens` and what is
    left when a quarter is taken off again and again; the first way that has little enough padding is the one of
    the fewest rounds. If none has, it is the last, which has the least padding.

    Args:
        lengths: tokens of each sequence, and of its encoder; ascending by their sum.
        batch_tokens: the most positions of a batch, 1 or more; a batch of one row may have more.
        n_shards: batches of a round, 1 or more.
        padding: share of the positions that may be padding.

    Returns:
        The numbers of the sequences of each round, in order.
    """
    if not lengths:
        return []
    length_N2 = np.array(lengths, dtype=np.int64)
    prices = [batch_tokens]
    while prices[-1] > 1:
        prices.append(prices[-1] * 3 // 4)
    n_tokens, rounds = int(length_N2.sum()), []
    for begin_N in _cheapest(length_N2, np.array(prices), batch_tokens, n_shards):
        rounds = _rounds(begin_N)
        n_positions = n_shards * sum(_batch_size(length_N2[pack], n_shards) for pack in rounds)
        if n_positions - n_tokens < max(padding * n_positions, _NOTHING * n_shards):
            break
    return rounds


def _cheapest(length_N2: IntArray, price_P: IntArray, batch_tokens: int, n_shards: int) -> IntArray:
    """For each price, with which sequence the round begins that a sequence is the last of; int64 ``[P, N]``."""
    n_sequences, every = len(length_N2), np.arange(len(price_P))
    cost_PN = np.zeros((len(price_P), n_sequences + 1), dtype=np.int64)  # of all sequences before one
    begin_PN = np.zeros((len(price_P), n_sequences), dtype=np.int64)
    first = 0
    for end in range(1, n_sequences + 1):
        width_W = np.maximum.accumulate(length_N2[first:end][::-1]).sum(axis=1)[::-1]
        n_rows_W = -(-np.arange(end - first, 0, -1) // n_shards)
        size_W = n_rows_W * width_W
        n_too_many = int(((size_W > batch_tokens) & (n_rows_W > 1)).sum())  # those that begin the earliest
        first += n_too_many
        total_PW = cost_PN[:, first:end] + size_W[n_too_many:]
        best_P = total_PW.argmin(axis=1)
        begin_PN[:, end - 1] = first + best_P
        cost_PN[:, end] = total_PW[every, best_P] + price_P
    return begin_PN


def _rounds(begin_N: IntArray) -> list[range]:
    rounds: list[range] = []
    end = len(begin_N)
    while end:
        rounds.append(range(int(begin_N[end - 1]), end))
        end = rounds[-1].start
    return rounds[::-1]


def _batch_size(length_R2: IntArray, n_shards: int) -> int:
    """Positions of each batch of a round of these sequences."""
    return -(-len(length_R2) // n_shards) * int(length_R2.max(axis=0).sum())

"""Few samples that need what all of them need: greedy maximum coverage of key neurons (the idea of EffiEval).

What is to be covered are pairs of a task and a key neuron of it; each weighs 1 / \\|U(task)\\|, so that all tasks count
alike whatever their size. A sample covers the pairs of its own task with its own key neurons.

Shapes: N samples, Q tasks, Z pairs of a sample and one of its key neurons, P pairs of a task and one of its key
neurons, S chosen samples.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from mui_callback.metrics.rarefaction import expected_union
from mui_callback.metrics.utilization import FloatArray, IntArray


@dataclass(frozen=True, eq=False)
class Kept:
    """Share of the coverage of all samples that the first 1, 2, … S samples keep."""

    overall: FloatArray
    """Mean over the tasks that have key neurons, ``[S]``."""
    by_task: tuple[FloatArray | None, ...]
    """\\|U\\| of the chosen samples of each task, over \\|U(task)\\|, ``[S]``; None for a task without key neurons."""


@dataclass(frozen=True, eq=False)
class Selection:
    """Samples in the order in which they were chosen."""

    order: IntArray
    """Index of each chosen sample, ``[S]``."""
    kept: Kept
    random: Kept
    """Expected, for as many samples drawn at random from all samples of all tasks."""


def greedy_max_coverage(sets: csr_array, task_N: IntArray, size: int) -> Selection:
    """Choose samples one by one, each time the one that adds most; the lower index wins a tie.

    The coverage is at least 1 - 1/e of the best that as many samples can have (Nemhauser, Wolsey and Fisher 1978). What
    a sample adds can only fall while others are chosen, so samples wait with an old value until they are first in
    line, and few are looked at again (Minoux 1978); the result is that of looking at all.

    A sample that adds nothing is not chosen: there are fewer than `size` where fewer keep everything.

    Args:
        sets: key neurons of each sample, ``[N, neurons]``, a row lists a neuron at most once.
        task_N: the task of each sample, int64 ``[N]``, counted from 0.
        size: samples to choose, from 1 to N.

    Raises:
        ValueError: `size` is out of its range, `task_N` has another length, or no sample has a key neuron.
    """
    n_samples = sets.shape[0]
    if task_N.shape != (n_samples,):
        raise ValueError(f"task_N: expected the task of each of the {n_samples} samples, got shape {task_N.shape}")
    if not 1 <= size <= n_samples:
        raise ValueError(f"size: expected a number from 1 to the {n_samples} samples, got {size}")
    if not sets.nnz:
        raise ValueError(f"sets: expected samples with key neurons, but none of {n_samples} has one")
    task_Z = np.repeat(task_N, np.diff(sets.indptr))
    pair_P, pair_Z = np.unique(task_Z * sets.shape[1] + sets.indices, return_inverse=True)
    task_P = pair_P // sets.shape[1]
    n_pairs_Q = np.bincount(task_P, minlength=int(task_N.max()) + 1)
    order = _greedy(np.split(pair_Z, sets.indptr[1:-1]), task_N, n_pairs_Q, size)

    pairs = [pair_Z[sets.indptr[sample] : sets.indptr[sample + 1]] for sample in order]
    first_P = np.full(len(pair_P), len(order))
    for place in reversed(range(len(order))):
        first_P[pairs[place]] = place
    sizes = np.arange(1, len(order) + 1)
    count_P = np.bincount(pair_Z)
    tasks = range(len(n_pairs_Q))
    covered = [np.bincount(first_P[task_P == task], minlength=len(order) + 1)[:-1].cumsum() for task in tasks]
    expected = [expected_union(count_P[task_P == task], n_samples, sizes) for task in tasks]
    return Selection(np.array(order), _kept(covered, n_pairs_Q), _kept(expected, n_pairs_Q))


def _greedy(pairs_N: list[IntArray], task_N: IntArray, n_pairs_Q: IntArray, size: int) -> list[int]:
    """Indices of the chosen samples, in order."""
    is_open_P = np.ones(n_pairs_Q.sum(), dtype=np.bool_)
    n_chosen_Q = np.zeros_like(n_pairs_Q)

    def entry(sample: int) -> tuple[float, int, int]:
        """What the sample adds now; how many of its task are chosen now, as only these change what it adds."""
        task = task_N[sample]
        # Equal shares of different tasks are equal as floats, too: a quotient is rounded once.
        return -np.count_nonzero(is_open_P[pairs_N[sample]]) / n_pairs_Q[task], sample, n_chosen_Q[task]

    line = [entry(sample) for sample in range(len(pairs_N)) if len(pairs_N[sample])]
    heapq.heapify(line)
    order: list[int] = []
    while line and len(order) < size:
        _, sample, n_chosen = line[0]
        if n_chosen == n_chosen_Q[task_N[sample]]:
            heapq.heappop(line)
            order.append(sample)
            is_open_P[pairs_N[sample]] = False
            n_chosen_Q[task_N[sample]] += 1
        elif (renewed := entry(sample))[0] < 0:
            heapq.heapreplace(line, renewed)
        else:
            heapq.heappop(line)
    return order


def _kept(covered: list[IntArray] | list[FloatArray], n_pairs_Q: IntArray) -> Kept:
    by_task = tuple(part / n if n else None for part, n in zip(covered, n_pairs_Q.tolist(), strict=True))
    overall: FloatArray = np.mean([share for share in by_task if share is not None], axis=0)
    return Kept(overall, by_task)

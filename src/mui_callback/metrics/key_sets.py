"""What follows from the key neurons of single samples: unions, and which experts own them.

Pairs of a sample and a key neuron of it are gone through in blocks, so memory beside the sets is a byte or two numbers
for each neuron of the model, and 128 MiB.

Shapes: N samples, Q tasks, E experts and J neurons of all layers, Z pairs of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from mui_callback.counts import KeySets
from mui_callback.layout import ExpertLayout
from mui_callback.metrics.utilization import BoolArray, IntArray

_PAIRS_AT_ONCE = 2**21


@dataclass(frozen=True, eq=False)
class OwnedCounts:
    """The key neurons of each sample, counted by the experts that own them."""

    n_neurons_N: IntArray
    """Key neurons of each sample."""
    n_shared_N: IntArray
    """Those of them that are in shared experts."""
    n_experts_N: IntArray
    """Experts that own a key neuron of the sample."""
    activated_QE: IntArray
    """Samples of the task in which the expert owns a key neuron."""


def as_sparse(sets: KeySets, n_neurons: int) -> csr_array:
    """The sets as a matrix of ones, uint8 ``[N, J]``; shares the memory of `sets` but for a byte a pair."""
    starts = np.concatenate([[0], sets.end])
    if len(sets.neuron) <= np.iinfo(np.int32).max:
        starts = starts.astype(np.int32)  # of one type with the neurons, which would be copied otherwise
    ones = np.ones(len(sets.neuron), dtype=np.uint8)
    return csr_array((ones, sets.neuron, starts), shape=(len(sets.end), n_neurons))


def union(sets: KeySets, is_in_N: BoolArray, n_neurons: int) -> BoolArray:
    """Whether each neuron is a key neuron of one of the samples, bool ``[J]``."""
    is_key_J = np.zeros(n_neurons, dtype=np.bool_)
    for sample_Z, neuron_Z in _blocks(sets):
        is_key_J[neuron_Z[is_in_N[sample_Z]]] = True
    return is_key_J


def count_in_experts(is_key_J: BoolArray, layout: ExpertLayout) -> IntArray:
    """How many of the neurons are in each expert, int64 ``[E]``."""
    ends = np.append(layout.first_neuron, layout.n_neurons)
    return np.diff(np.searchsorted(np.flatnonzero(is_key_J), ends))


def count_owned(sets: KeySets, layout: ExpertLayout, task_N: IntArray, n_tasks: int) -> OwnedCounts:
    """Count the key neurons of each sample, and the samples that activate each expert.

    Args:
        sets: the key neurons of each sample, ascending in each.
        layout: the numbering.
        task_N: the task of each sample.
        n_tasks: Q.
    """
    n_samples, n_experts = len(sets.end), layout.n_experts
    expert_J = np.repeat(np.arange(n_experts, dtype=np.int32), layout.width)
    n_shared_N, n_experts_N = (np.zeros(n_samples, dtype=np.int64) for _ in range(2))
    activated = np.zeros(n_tasks * n_experts, dtype=np.int64)
    last = -1
    for sample_Z, neuron_Z in _blocks(sets):
        expert_Z = expert_J[neuron_Z]
        n_shared_N += np.bincount(sample_Z[layout.is_shared[expert_Z]], minlength=n_samples)
        # neurons ascend in a sample, so those of one expert follow each other
        owner_Z = sample_Z * n_experts + expert_Z
        sample, expert = np.divmod(owner_Z[np.diff(owner_Z, prepend=last) != 0], n_experts)
        last = owner_Z[-1]
        n_experts_N += np.bincount(sample, minlength=n_samples)
        activated += np.bincount(task_N[sample] * n_experts + expert, minlength=len(activated))
    n_neurons_N = np.diff(sets.end, prepend=0)
    return OwnedCounts(n_neurons_N, n_shared_N, n_experts_N, activated.reshape(n_tasks, n_experts))


def _blocks(sets: KeySets) -> Iterator[tuple[IntArray, NDArray[np.int32]]]:
    """The sample and the neuron of each pair, int64 ``[Z]`` and int32 ``[Z]``."""
    for start in range(0, len(sets.neuron), _PAIRS_AT_ONCE):
        neuron_Z = sets.neuron[start : start + _PAIRS_AT_ONCE]
        in_block_N = np.diff(sets.end.clip(start, start + len(neuron_Z)), prepend=start)
        yield np.repeat(np.arange(len(sets.end)), in_block_N), neuron_Z

"""What a probe pass counted: plain arrays from which every metric follows.

Counts and sets are merged by sum and union over samples, batches, layers and processes; ratios are taken from them
once, at the end.

Shapes: N samples of the probe, Q tasks, L layers, E experts of all layers, C choices of all samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class ProbeCounts:
    """The counts of one pass."""

    key_neurons: NDArray[np.uint8]
    """U(task), the union of the samples' key neurons, as packed bits ``[Q, bytes]``; each layer begins at a byte."""
    activated: NDArray[np.int64]
    """Samples in which the expert owns at least one key neuron, ``[Q, E]``."""
    mass: NDArray[np.float64]
    """Σ \\|f\\| over the response tokens of the task's samples and the neurons of the expert, ``[Q, E]``."""
    routed: NDArray[np.int64]
    """Response tokens that the router sends to the expert (all of them for a shared expert), ``[Q, E]``."""
    loss: NDArray[np.float64]
    """Σ negative log-likelihood of the sample's response tokens, in nats, ``[N]``."""
    correct: NDArray[np.int64]
    """Response tokens of the sample that are the model's first choice, ``[N]``."""
    choice_loss: NDArray[np.float64]
    """Σ negative log-likelihood of each choice of each sample, in nats, ``[C]``."""
    dropped: NDArray[np.int64]
    """Of `assigned`, those that the capacity of training would drop, ``[L]``."""
    assigned: NDArray[np.int64]
    """Pairs of token and expert that routers with a limited capacity chose, over all positions, ``[L]``."""
    not_finite: NDArray[np.int64]
    """Contributions and token losses that were not finite, ``[1]``."""
    identity_error: NDArray[np.float64]
    """How far, in the first batch, each layer is from the identity Σ f = ⟨output, W_head[y]⟩, relative, ``[L]``."""
    head_error: NDArray[np.float64]
    """How far, in the first batch, the targets' logits are from what W_head makes of the hidden states, ``[1]``."""


def n_bytes(n_neurons: int) -> int:
    """Bytes of a packed set over this many neurons: eight a byte, the lowest number in the lowest bit."""
    return -(-n_neurons // 8)


def unpack(bits: NDArray[np.uint8], n_neurons: int) -> NDArray[np.bool_]:
    """Packed sets, uint8 ``[…, ceil(n / 8)]``, as bool ``[…, n]``."""
    return np.unpackbits(bits, axis=-1, count=n_neurons, bitorder="little").astype(np.bool_)


def unpack_layers(bits: NDArray[np.uint8], n_neurons: Sequence[int]) -> NDArray[np.bool_]:
    """Bool ``[…, sum(n_neurons)]`` from sets of several layers, each of which begins at a byte of its own."""
    ends = np.cumsum([n_bytes(n) for n in n_neurons])
    parts = np.split(bits, ends[:-1], axis=-1)
    return np.concatenate([unpack(part, n) for part, n in zip(parts, n_neurons, strict=True)], axis=-1)

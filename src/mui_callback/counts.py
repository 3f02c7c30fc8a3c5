"""What a probe pass counted: plain arrays from which every metric follows.

Counts and sets are merged by sum and union over samples, batches, layers and processes; ratios are taken from them
once, at the end.

Shapes: N samples of the probe, Q tasks, L layers, E experts and J neurons of all layers, C choices of all samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class KeySets:
    """The key neurons of each sample under one rule: a sparse set of M pairs.

    The rules that take a fixed share of a layer's entries bound M to N times that share of J; a pair takes 4 bytes.
    """

    neuron: NDArray[np.int32]
    """Numbers on the neurons axis of all layers, those of the first sample first; in a sample ascending, each once,
    ``[M]``."""
    end: NDArray[np.int64]
    """How many pairs the samples up to and including each have, ``[N]``."""

    @property
    def sample(self) -> NDArray[np.int64]:
        """The sample of each pair, ``[M]``."""
        return np.repeat(np.arange(len(self.end)), np.diff(self.end, prepend=0))


@dataclass(frozen=True, eq=False)
class ProbeCounts:
    """The counts of one pass."""

    key_sets: tuple[KeySets, ...]
    """For each rule of the settings."""
    mass: NDArray[np.float64]
    """Σ \\|f\\| over the response tokens of the task's samples and the neurons of the expert, ``[Q, E]``."""
    routed: NDArray[np.int64]
    """Response tokens that the router sends to the expert (all of them for a shared expert), ``[Q, E]``."""
    sample_mass: NDArray[np.float64]
    """Σ \\|f\\| over the response tokens of the sample and the neurons of routed and of shared experts, ``[N, 2]``."""
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

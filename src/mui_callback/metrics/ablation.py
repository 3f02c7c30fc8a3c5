"""Is a key neuron really key? The change of a task's loss without its key neurons, next to that without random ones.

Shapes: N samples of a task, K random draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mui_callback.metrics.resampling import Interval, bootstrap_intervals, ratio_of_sums
from mui_callback.metrics.utilization import FloatArray, IntArray


@dataclass(frozen=True)
class LossChange:
    """A change of loss, in nats per response token."""

    value: float
    interval: Interval | None
    """Over samples, by the paired bootstrap; None for fewer than two samples, or where all change alike."""


@dataclass(frozen=True)
class LossChanges:
    """What masking does to the loss of a task."""

    loss: float
    """With nothing masked, in nats per response token."""
    key: LossChange
    """With the key ones masked."""
    random: LossChange
    """With random ones masked, mean over the draws. The interval takes the draws as they are."""
    difference: LossChange
    """`key` less `random`."""
    random_draws: tuple[float, ...]
    """The change of each draw."""


def loss_changes(
    loss_N: FloatArray,
    key_loss_N: FloatArray,
    random_loss_KN: FloatArray,
    n_tokens_N: IntArray,
    *,
    level: float,
    seed: int,
) -> LossChanges | None:
    """The change of loss per token and its intervals, which resample the same samples under all masks.

    Args:
        loss_N: Σ loss of each sample's response tokens with nothing masked, in nats.
        key_loss_N: the same with the key ones masked.
        random_loss_KN: the same with random ones masked.
        n_tokens_N: response tokens of each sample.
        level: of the intervals.
        seed: of the bootstrap.

    Returns:
        None without response tokens.
    """
    random_loss_N = random_loss_KN.mean(axis=0)
    amounts = {
        "loss": loss_N,
        "key": key_loss_N - loss_N,
        "random": random_loss_N - loss_N,
        "difference": key_loss_N - random_loss_N,
    }
    n_tokens = n_tokens_N.astype(np.float64)
    estimates = {name: ratio_of_sums(amount_N, n_tokens) for name, amount_N in amounts.items()}
    intervals = bootstrap_intervals(estimates, level=level, seed=seed)
    known = {name: LossChange(one.value, intervals[name]) for name, one in estimates.items() if one is not None}
    if len(known) < len(estimates):
        return None
    return LossChanges(
        loss=known["loss"].value,
        key=known["key"],
        random=known["random"],
        difference=known["difference"],
        random_draws=tuple(((random_loss_KN - loss_N).sum(axis=1) / n_tokens.sum()).tolist()),
    )

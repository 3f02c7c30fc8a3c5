"""Is a key neuron really key? The change of a task's loss without its key neurons, next to that without random ones.

Shapes: N samples of a task, K random draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mui_callback.metrics.rarefaction import t_quantile
from mui_callback.metrics.resampling import Interval, bootstrap_intervals, ratio_of_sums
from mui_callback.metrics.utilization import FloatArray, IntArray


@dataclass(frozen=True)
class LossChange:
    """A change of loss, in nats per response token."""

    value: float
    interval: Interval | None
    """None for fewer than two samples, or where all change alike."""


@dataclass(frozen=True)
class LossChanges:
    """What masking does to the loss of a task."""

    loss: float
    """With nothing masked, in nats per response token."""
    key: LossChange
    """With the key ones masked; its interval is over samples."""
    random: LossChange
    """With random ones masked, mean over the draws; its interval is over samples and draws, as the next."""
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
    """The change of loss per token and its intervals.

    Over samples they are those of the bootstrap, with the same samples under all masks. Which random ones are drawn is
    another source of error: the mean of the draws has Student's interval of K - 1 degrees of freedom. The two are put
    together as those of independent parts of a sum: by the root of the sum of the squares of what each reaches to one
    side (Zou and Donner 2008). A single draw does not tell how draws differ; the interval is then over samples alone.

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
    draws_K = (random_loss_KN - loss_N).sum(axis=1) / max(n_tokens.sum(), 1)
    reach = {"random": _reach(draws_K, level), "difference": _reach(draws_K, level)}
    known = {
        name: LossChange(one.value, _widened(one.value, intervals[name], reach.get(name, 0.0)))
        for name, one in estimates.items()
        if one is not None
    }
    if len(known) < len(estimates):
        return None
    return LossChanges(
        loss=known["loss"].value,
        key=known["key"],
        random=known["random"],
        difference=known["difference"],
        random_draws=tuple(draws_K.tolist()),
    )


def _reach(draws_K: FloatArray, level: float) -> float:
    """Half of Student's interval of the mean; 0 for a single draw."""
    k = len(draws_K)
    return t_quantile(k - 1, level) * float(draws_K.std(ddof=1)) / k**0.5 if k > 1 else 0.0


def _widened(value: float, interval: Interval | None, reach: float) -> Interval | None:
    """The interval with another, independent source of error, which reaches as far to both sides."""
    if interval is None:
        return None
    low, high = ((end - value) ** 2 + reach**2 for end in (interval.low, interval.high))
    return Interval(value - low**0.5, value + high**0.5, interval.level)

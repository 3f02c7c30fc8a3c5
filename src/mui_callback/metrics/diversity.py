"""How diverse data is to a model: its MUI beside that of other data, and what it would reach with more samples.

MUI grows with the number of samples, so data sets are compared at equal numbers of samples. Key neurons of a sample
come together and depend on each other; samples do not, so every interval is from the spread between samples.

Shapes: N samples, J neurons of the model. A data set is a `scipy.sparse.csr_array` ``[N, J]``, see
`mui_callback.metrics.rarefaction`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.sparse import csr_array
from scipy.special import ndtri

from mui_callback.metrics.rarefaction import (
    CoverageCurve,
    checked_level,
    checked_shape,
    counts,
    coverage_curve,
    jackknife_variance,
    neurons_among,
    t_quantile,
)
from mui_callback.metrics.utilization import FloatArray

_ROUNDING = 1e-12
"""MUI may differ by this without a difference; it is less than one neuron in any model."""


@dataclass(frozen=True)
class IntervalEstimate:
    """A value and the ends of its confidence interval, both None where the samples do not give one."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference:
    """MUI of one data set less that of another, at the same number of samples."""

    first: str
    second: str
    mui: IntervalEstimate

    @property
    def is_clear(self) -> bool | None:
        """Whether the interval leaves out zero; None where there is no interval."""
        if self.mui.low is None or self.mui.high is None:
            return None
        return self.mui.low > 0 or self.mui.high < 0


@dataclass(frozen=True)
class Comparison:
    """Data sets at the same number of samples."""

    size: int
    """The number of samples."""
    level: float
    """Of each interval in `mui`, and of all in `differences` together."""
    mui: Mapping[str, IntervalEstimate]
    """Expected MUI of `size` samples of each data set."""
    differences: tuple[Difference, ...]
    """Of each pair of data sets, in order."""


def chao2(sets: csr_array, *, level: float = 0.95) -> IntervalEstimate | None:
    """MUI that ever more samples of the kind would come to (Chao 1987; Colwell et al. 2012): a lower bound.

    With Q1 and Q2 neurons that exactly one and exactly two of n samples have, those not seen yet are estimated as
    (n - 1)/n · Q1² / (2 Q2), and where Q2 is 0 in the bias-corrected form (n - 1)/n · Q1 (Q1 - 1) / (2 (Q2 + 1)); never
    as more than the model has. In theory this is a lower bound, as neurons that are needed very rarely leave hardly
    a trace in Q1 and Q2.

    The interval is log-normal about what was not seen, so that it begins above what was seen (Chao 1987). Its standard
    error is that of the delete-one jackknife over samples: Chao's own takes neurons for independent, and is too
    small where they come together, as those of one subject do. It is an interval for the bound, not for what lies
    above the bound; rather too long from some fifteen samples on, and too short with fewer. There is none where the
    estimate is what was seen, and no estimate from a single sample.

    Args:
        sets: key neurons of each sample, ``[N, J]``.
        level: of the confidence interval, in (0, 1).

    Raises:
        ValueError: `sets` has no row or no column, or the level is not in (0, 1).
    """
    n_samples, n_neurons = checked_shape(sets)
    z = float(ndtri((1 + checked_level(level)) / 2))
    if n_samples == 1:
        return None
    count_J = counts(sets)
    n_seen = int((count_J > 0).sum())
    once, twice = (float((count_J == count).sum()) for count in (1, 2))
    unseen = float(_unseen(np.float64(once), np.float64(twice), n_samples))
    if unseen == 0:
        return IntervalEstimate(n_seen / n_neurons, None, None)
    # Without a sample the neurons that it alone has are gone, and those that it shares with one other are that one's.
    once_N, twice_N, thrice_N = (neurons_among(sets, count_J == count) for count in (1, 2, 3))
    unseen_N = _unseen(once - once_N + twice_N, twice - twice_N + thrice_N, n_samples - 1)
    variance = float(jackknife_variance(unseen_N - once_N))
    factor = float(np.exp(z * np.sqrt(np.log1p(variance / unseen**2))))
    value, low, high = (
        min(n_seen + part, n_neurons) / n_neurons for part in (unseen, unseen / factor, unseen * factor)
    )
    return IntervalEstimate(value, low, high)


def compare(sets: Mapping[str, csr_array], *, size: int | None = None, level: float = 0.95) -> Comparison:
    """Compare data sets at the same number of samples.

    Samples of two data sets are independent, so the variances add up to that of the difference; its interval is
    Welch's. The level of the differences is that of all of them together (Bonferroni), so that among many data sets
    none differ just because there are many.

    Args:
        sets: key neurons of each sample of each data set, ``[N, J]`` with the same J.
        size: number of samples, at most that of the smallest data set, which is the default.
        level: of the confidence intervals, in (0, 1).

    Raises:
        ValueError: there is no data set, one has no sample, they have different numbers of neurons, or `size` or the
            level is out of its range.
    """
    size = common_size({name: one.shape[0] for name, one in sets.items()}, size)
    if len({one.shape[1] for one in sets.values()}) > 1:
        neurons = ", ".join(f"{name}: {one.shape[1]}" for name, one in sets.items())
        raise ValueError(f"sets: expected the key neurons of one model, got different numbers of neurons ({neurons})")
    curves = {name: coverage_curve(one, np.array([size]), level=level) for name, one in sets.items()}
    pairs = list(combinations(curves, 2))
    level_of_one = 1 - (1 - level) / max(len(pairs), 1)
    return Comparison(
        size=size,
        level=level,
        mui={name: _only(curve) for name, curve in curves.items()},
        differences=tuple(Difference(a, b, _difference(curves[a], curves[b], level_of_one)) for a, b in pairs),
    )


def common_size(n_samples: Mapping[str, int], size: int | None = None) -> int:
    """The number of samples to compare data sets at: `size`, or that of the smallest one.

    Raises:
        ValueError: there is no data set, or the smallest has fewer samples.
    """
    if not n_samples:
        raise ValueError("expected one or more data sets, got none")
    smallest = min(n_samples, key=lambda name: n_samples[name])
    n = n_samples[smallest]
    if size is not None and not 1 <= size <= n:
        raise ValueError(
            f"expected a number of samples to compare at from 1 to {n}, which is all that {smallest!r} has, got {size}"
        )
    return n if size is None else size


def _unseen(once: FloatArray | np.float64, twice: FloatArray | np.float64, n: int) -> FloatArray:
    """Chao2's estimate of the neurons that no sample has, of each pair of Q1 and Q2."""
    corrected = once * (once - 1) / 2
    estimate: FloatArray = (n - 1) / n * np.where(twice > 0, once**2 / (2 * np.maximum(twice, 1)), corrected)
    return estimate


def _only(curve: CoverageCurve) -> IntervalEstimate:
    low, high = (None if end is None else float(end[0]) for end in (curve.low, curve.high))
    return IntervalEstimate(float(curve.mui[0]), low, high)


def _difference(first: CoverageCurve, second: CoverageCurve, level: float) -> IntervalEstimate:
    value = float(first.mui[0] - second.mui[0])
    if first.error is None or second.error is None:
        return IntervalEstimate(value, None, None)
    variances = float(first.error[0]) ** 2, float(second.error[0]) ** 2
    half = _ROUNDING
    if sum(variances) > 0:
        of_degrees = sum(v**2 / (curve.n_samples - 1) for v, curve in zip(variances, (first, second), strict=True))
        half += t_quantile(sum(variances) ** 2 / of_degrees, level) * sum(variances) ** 0.5
    return IntervalEstimate(value, value - half, value + half)

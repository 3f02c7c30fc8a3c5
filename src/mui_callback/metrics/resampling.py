"""Error bars of one probe pass: what each sample adds to a value, and the bootstrap over samples.

What is uncertain is which samples are in the probe; they are taken for independent draws of what is to be measured.
Samples that come together, such as several questions on one text, make every interval here too short.

Shapes: N samples, J neurons of the model, R replicates of the bootstrap.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.special import ndtr

from mui_callback.metrics.rarefaction import counts, neurons_among, t_quantile
from mui_callback.metrics.utilization import BoolArray, FloatArray, ratio

_PAIRS_AT_ONCE = 2**18
_ROUNDING = 1e-12
"""Influences that are smaller, relative to the value, are rounding errors."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """A value that was measured on N samples, and what each of them adds to it.

    To first order a replicate of the bootstrap with multinomial weights w has the value
    value + Σ (w_i - 1) · influence_i.
    """

    value: float
    influence: FloatArray
    """In the unit of the value, float64 ``[N]``; adds up to 0."""

    @property
    def counts(self) -> BoolArray:
        """Which samples the value is of, ``[N]``; the others add nothing."""
        return np.ones(len(self.influence), dtype=np.bool_)

    @property
    def n_samples(self) -> int:
        """Samples that the value is of."""
        return int(self.counts.sum())

    @property
    def standard_error(self) -> float | None:
        """sqrt(n / (n - 1) · Σ influence²); None for fewer than two samples."""
        n = self.n_samples
        return float(np.sqrt(n / (n - 1) * (self.influence**2).sum())) if n > 1 else None

    def over(self, whole: Estimate | float) -> Estimate | None:
        """This value divided by another one of the same samples, or by a constant; None where that is 0.

        The influence is that of the delta method.

        Raises:
            ValueError: the other value is of a different number of samples.
        """
        value = ratio(self.value, whole.value if isinstance(whole, Estimate) else whole)
        if value is None:
            return None
        if not isinstance(whole, Estimate):
            return Estimate(value, self.influence / whole)
        if len(whole.influence) != len(self.influence):
            sizes = f"{len(self.influence)} and {len(whole.influence)}"
            raise ValueError(f"expected values of the same samples, got those of {sizes} samples")
        return Estimate(value, (self.influence - value * whole.influence) / whole.value)

    def replicated(self, weight_RN: FloatArray) -> FloatArray:
        """The value in each replicate, float64 ``[R]``; NaN where a replicate has none."""
        return self.value + weight_RN @ self.influence


@dataclass(frozen=True, eq=False)
class _RatioOfSums(Estimate):
    """Recomputed exactly in each replicate."""

    numerator_N: FloatArray
    denominator_N: FloatArray

    @property
    def counts(self) -> BoolArray:
        is_of_N: BoolArray = (self.numerator_N != 0) | (self.denominator_N != 0)
        return is_of_N

    def replicated(self, weight_RN: FloatArray) -> FloatArray:
        whole_R = weight_RN @ self.denominator_N
        value_R = np.full(len(whole_R), np.nan)
        np.divide(weight_RN @ self.numerator_N, whole_R, out=value_R, where=whole_R != 0)
        return value_R


@dataclass(frozen=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float
    level: float
    """In (0, 1)."""

    def within(self, low: float, high: float | None) -> Interval:
        """Clipped to the values that are possible; None: no upper bound."""
        low_end, high_end = (float(np.clip(end, low, high)) for end in (self.low, self.high))
        return Interval(low_end, high_end, self.level)


def ratio_of_sums(numerator_N: FloatArray, denominator_N: FloatArray) -> Estimate | None:
    """Σ numerator / Σ denominator: loss per token, bits per byte, an accuracy, a share of mass.

    The influence is (numerator - value · denominator) / Σ denominator. Samples for which both are 0, such as those
    without choices in the accuracy of choices, do not count as samples of the value.

    Args:
        numerator_N: one amount for each sample, ``[N]``.
        denominator_N: the same of what it is divided by, not negative.

    Returns:
        None where the denominators add up to 0, or a sum is not finite.

    Raises:
        ValueError: the lengths differ.
    """
    numerator_N, denominator_N = (np.asarray(amount, dtype=np.float64) for amount in (numerator_N, denominator_N))
    if numerator_N.shape != denominator_N.shape or numerator_N.ndim != 1:
        raise ValueError(
            "expected one numerator and one denominator for each sample, "
            f"got the shapes {numerator_N.shape} and {denominator_N.shape}"
        )
    whole = float(denominator_N.sum())
    value = ratio(float(numerator_N.sum()), whole)
    if value is None:
        return None
    return _RatioOfSums(value, (numerator_N - value * denominator_N) / whole, numerator_N, denominator_N)


def union_size(sets: csr_array, where_J: BoolArray | None = None) -> Estimate | None:
    """\\|U\\|, the number of neurons that at least one sample has; MUI is ``union_size(sets).over(J)``.

    A union is not a smooth function of the weights of a bootstrap. A resample with replacement leaves out some 37 % of
    the samples and lacks what these had for themselves, so a plain bootstrap of \\|U\\| is too low by far more than its
    own spread, and its interval need not even hold \\|U\\|. The influence is therefore that of the jackknife: without a
    sample the union is smaller by the neurons that it alone has, so influence_i = own_i - mean of own.

    The variance n / (n - 1) · Σ influence² is exact on average where samples share nothing, and on average not too
    small where they do (Efron and Stein 1981). It is that of `mui_callback.metrics.rarefaction.coverage_curve` at all N
    samples, and (n / (n - 1))² times that of the textbook's jackknife, which is meant for means and too small for sums.

    Args:
        sets: key neurons of each sample, ``[N, J]``, ones; a row lists a neuron at most once.
        where_J: the neurons that count, bool ``[J]``; all where it is None.

    Returns:
        None without samples.

    Raises:
        ValueError: `where_J` does not have one entry for each neuron.
    """
    n_samples, n_neurons = sets.shape
    if where_J is not None and where_J.shape != (n_neurons,):
        raise ValueError(f"where_J: expected one entry for each of {n_neurons} neurons, got the shape {where_J.shape}")
    if n_samples == 0:
        return None
    count_J = counts(sets)
    is_in_J, is_own_J = count_J > 0, count_J == 1
    if where_J is not None:
        is_in_J, is_own_J = is_in_J & where_J, is_own_J & where_J
    own_N = neurons_among(sets, is_own_J)
    return Estimate(float(is_in_J.sum()), own_N - own_N.mean())


def bootstrap_weights(n_samples: int, replicates: int = 1000, seed: int = 0) -> Iterator[FloatArray]:
    """How often each sample is drawn in each replicate, in blocks of float64 ``[R, N]``.

    A replicate draws N samples with replacement. The weights depend on the seed and on N alone, so measures of the same
    samples, at whatever step, are resampled together, and more replicates begin with the fewer ones.

    Memory is 32 bytes for each pair of a replicate and a sample in a block: 8 MiB, or 32 · N bytes where that is more.
    """
    rng = np.random.default_rng(seed)
    rows = max(1, _PAIRS_AT_ONCE // n_samples)
    for start in range(0, replicates, rows):
        block = min(rows, replicates - start)
        drawn_RN = rng.integers(n_samples, size=(block, n_samples))
        drawn_RN += n_samples * np.arange(block)[:, None]
        weight_RN = np.bincount(drawn_RN.ravel(), minlength=drawn_RN.size).reshape(drawn_RN.shape)
        yield weight_RN.astype(np.float64)


def bootstrap_intervals(
    estimates: Mapping[str, Estimate | None], *, replicates: int = 1000, level: float = 0.95, seed: int = 0
) -> dict[str, Interval | None]:
    """Percentile intervals of measures of the same samples, all from the same weights.

    A ratio of sums is recomputed in each replicate; the others follow their linear form. The percentiles are widened as
    Hesterberg (2015, "What Teachers Should Know About the Bootstrap") does for small n: their tails are
    Φ(-sqrt(n / (n - 1)) · t), with t the quantile of Student's t of n - 1 degrees of freedom, so that the interval of a
    mean is as long as Student's. With fewer than five samples a tail is less than one in a thousand replicates, and the
    interval stays too short. A replicate in which a ratio has no denominator does not count for it.

    There is no interval for fewer than two samples, nor where every sample adds the same: that all of ten answers are
    right does not tell how likely a wrong one is; nor where no replicate counts.

    Memory is that of `bootstrap_weights` and 8 bytes for each replicate of each measure.

    Args:
        estimates: by name; a measure without an answer is None, and so is its interval.
        replicates: R, at least 1.
        level: of each interval, in (0, 1).
        seed: of the weights.

    Raises:
        ValueError: the estimates are of different numbers of samples, or an argument is out of its range.
    """
    if replicates < 1:
        raise ValueError(f"replicates: expected a positive number, got {replicates!r}")
    t_quantile(1, level)  # raises
    known = {name: one for name, one in estimates.items() if one is not None}
    sizes = {name: len(one.influence) for name, one in known.items()}
    if len(set(sizes.values())) > 1:
        got = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise ValueError(f"expected estimates of the same samples, got different numbers of samples ({got})")
    spread = {name: one for name, one in known.items() if _has_spread(one)}
    parts: dict[str, list[FloatArray]] = {name: [] for name in spread}
    for weight_RN in bootstrap_weights(max(sizes.values()), replicates, seed) if spread else ():
        for name, one in spread.items():
            parts[name].append(one.replicated(weight_RN))
    intervals: dict[str, Interval | None] = dict.fromkeys(estimates)
    for name, one in spread.items():
        intervals[name] = _percentiles(np.concatenate(parts[name]), one.n_samples, level)
    return intervals


def _has_spread(estimate: Estimate) -> bool:
    return bool(np.abs(estimate.influence).max(initial=0) > _ROUNDING * abs(estimate.value))


def _percentiles(value_R: FloatArray, n_samples: int, level: float) -> Interval | None:
    known_R = value_R[np.isfinite(value_R)]
    if not len(known_R):
        return None
    tail = float(ndtr(-np.sqrt(n_samples / (n_samples - 1)) * t_quantile(n_samples - 1, level)))
    low, high = np.quantile(known_R, [tail, 1 - tail])
    return Interval(float(low), float(high), level)

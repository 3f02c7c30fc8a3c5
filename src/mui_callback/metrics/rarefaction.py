"""MUI by the number of samples: the coverage curve of a data set, exact over all orders of its samples.

A data set is the key neurons of each of its samples: a `scipy.sparse.csr_array` ``[N, J]`` of ones in which a row lists
a neuron at most once. A sample without response tokens is an empty row.

Shapes: N samples, J neurons of the model, Z pairs of a sample and one of its key neurons, C distinct counts (a neuron's
count is the number of samples that it is a key neuron of), M sizes (numbers of samples).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.special import stdtrit

from mui_callback.metrics.utilization import BoolArray, FloatArray, IntArray

_SIZES_AT_ONCE = 256
_PAIRS_AT_ONCE = 2**24


@dataclass(frozen=True, eq=False)
class CoverageCurve:
    """Expected MUI of m samples drawn from a data set, in [0, 1]."""

    n_samples: int
    sizes: IntArray
    """m, ``[M]``."""
    mui: FloatArray
    """Mean over all choices of m of the samples, ``[M]``."""
    error: FloatArray | None
    """Standard error, ``[M]``; None for a single sample."""
    low: FloatArray | None
    """Lower end of the confidence interval, ``[M]``; None for a single sample."""
    high: FloatArray | None
    """Upper end, ``[M]``; None for a single sample."""


def coverage_curve(sets: csr_array, sizes: IntArray, *, level: float = 0.95) -> CoverageCurve:
    """Expected MUI of m samples, for each m of `sizes`; ``np.arange(1, n + 1)`` is the whole curve.

    The mean over all choices of m of the n samples is exact: none of them has a neuron of count c with probability
    C(n - c, m) / C(n, m) (rarefaction: Hurlbert 1971; Mao Tau in Colwell et al. 2012).

    The interval is about which samples were drawn, and holds however the neurons depend on each other. It is that of
    the delete-one jackknife, with Student's t of n - 1 degrees of freedom. The curve without one sample is the
    rarefaction of the other n - 1, and the mean of these n curves is the curve itself; the variance that they give is
    on average not too small (Efron and Stein 1981), and does not shrink to zero towards m = n, as the spread over
    random orders does. At m = n, which n - 1 samples do not reach, it is n times the variance, over the samples, of
    the number of neurons that no other sample has: that of the jackknife's pseudo-values of \\|U\\|, scaled by
    (n / (n - 1))² to be right where samples share nothing. At m = 1 this is Student's interval for the mean size of a
    set; as there, few samples with sets of very unequal sizes make it too short.

    Memory is O(Z + N · M), with M at most 256 at a time; time is O(Z + N · C · M).

    Args:
        sets: key neurons of each sample, ``[N, J]``.
        sizes: numbers of samples from 1 to N, int64 ``[M]``.
        level: of the confidence interval, in (0, 1).

    Raises:
        ValueError: `sets` has no row or no column, a size is not in [1, N], or the level not in (0, 1).
    """
    n_samples, n_neurons = checked_shape(sets)
    sizes = np.asarray(sizes, dtype=np.int64)
    if ((sizes < 1) | (sizes > n_samples)).any():
        raise ValueError(f"sizes: expected numbers from 1 to the {n_samples} samples, got {sizes.tolist()}")
    t = t_quantile(n_samples - 1, level)
    count_J = counts(sets)
    mui = expected_union(count_J[count_J > 0], n_samples, sizes) / n_neurons
    if n_samples == 1:
        return CoverageCurve(n_samples, sizes, mui, None, None, None)
    error = np.sqrt(_variance(sets, count_J, sizes)) / n_neurons
    low, high = np.maximum(mui - t * error, 0.0), np.minimum(mui + t * error, 1.0)
    return CoverageCurve(n_samples, sizes, mui, error, low, high)


def counts(sets: csr_array) -> IntArray:
    """The number of samples that each neuron is a key neuron of, int64 ``[J]``."""
    count_J = np.zeros(sets.shape[1], dtype=np.int64)
    for start in range(0, len(sets.indices), _PAIRS_AT_ONCE):
        count_J += np.bincount(sets.indices[start : start + _PAIRS_AT_ONCE], minlength=len(count_J))
    return count_J


def neurons_among(sets: csr_array, wanted_J: BoolArray) -> FloatArray:
    """How many of some neurons each sample has, float64 ``[N]``."""
    hits = np.flatnonzero(wanted_J[sets.indices])
    n_N: FloatArray = np.diff(np.searchsorted(hits, sets.indptr)).astype(np.float64)
    return n_N


def expected_union(count_J: IntArray, n_samples: int, sizes: IntArray) -> FloatArray:
    """Expected \\|U\\| of m samples out of `n_samples`, drawn without replacement, float64 ``[M]``.

    Args:
        count_J: the number of samples that have each neuron, at least 1.
        n_samples: N.
        sizes: m, in [0, N], ``[M]``.
    """
    count_C, n_neurons_C = np.unique(count_J, return_counts=True)
    parts = [n_neurons_C @ (1 - _missed(count_C, n_samples, part)) for part in _parts(sizes)]
    return np.concatenate([np.zeros(0), *parts])


def jackknife_variance(without_N: FloatArray) -> FloatArray:
    """Variance of a statistic from its values without one sample, over the first axis; they may miss a constant."""
    n = len(without_N)
    variance: FloatArray = (n - 1) / n * ((without_N - without_N.mean(axis=0)) ** 2).sum(axis=0)
    return variance


def t_quantile(degrees: float, level: float) -> float:
    """Half the width, in standard errors, of Student's interval; NaN without a degree of freedom.

    Raises:
        ValueError: the level is not in (0, 1).
    """
    return float(stdtrit(degrees, (1 + checked_level(level)) / 2))


def checked_level(level: float) -> float:
    """The level of an interval, in (0, 1); raises `ValueError` if it is not."""
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number in (0, 1), got {level!r}")
    return level


def checked_shape(sets: csr_array) -> tuple[int, int]:
    """N and J, both 1 or more; raises `ValueError` if they are not."""
    n_samples, n_neurons = sets.shape
    if n_samples == 0 or n_neurons == 0:
        raise ValueError(f"sets: expected one or more samples and neurons, got the shape {sets.shape}")
    return int(n_samples), int(n_neurons)


def _missed(count_C: IntArray, n: int, sizes: IntArray) -> FloatArray:
    """C(n - c, m) / C(n, m), float64 ``[C, M]``: how likely m of n samples miss a neuron that c of them have."""
    others = np.arange(count_C.max(initial=0))[:, None]
    # One factor for each of the c samples, in [0, 1] until one is zero: no large numbers, no differences of close ones.
    factors = (n - others - sizes) / np.maximum(n - others, 1)
    chance: FloatArray = np.cumprod(factors, axis=0)[count_C - 1]
    return chance


def _variance(sets: csr_array, count_J: IntArray, sizes: IntArray) -> FloatArray:
    """Variance of the rarefied \\|U\\|, ``[M]``.

    Without a sample the curve is lower by the sum, over its neurons with their counts c, of
    C(n - 1 - c, m - 1) / C(n - 1, m) = m / (n - m) · C(n - 1 - c, m - 1) / C(n - 1, m - 1); what is lost besides is the
    same for every sample.
    """
    n = sets.shape[0]
    count_C, position_Z = np.unique(count_J[sets.indices], return_inverse=True)
    neurons_NC = csr_array((np.ones(len(position_Z)), position_Z, sets.indptr.copy()), shape=(n, len(count_C)))
    neurons_NC.sum_duplicates()
    variances = []
    for part in _parts(sizes):
        below_n = np.minimum(part, n - 1)
        influence_CM = part / (n - below_n) * _missed(count_C, n - 1, below_n - 1)
        variances.append(jackknife_variance(neurons_NC @ influence_CM))
    return np.concatenate([np.zeros(0), *variances])


def _parts(sizes: IntArray) -> Iterator[IntArray]:
    for start in range(0, len(sizes), _SIZES_AT_ONCE):
        yield sizes[start : start + _SIZES_AT_ONCE]

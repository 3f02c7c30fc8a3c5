"""How diverse each of several data sets is, and all of them side by side: numbers without a model, a screen or a file.

Shapes: N samples, J neurons of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from mui_callback.metrics.diversity import Comparison, IntervalEstimate, chao2, compare
from mui_callback.metrics.rarefaction import CoverageCurve, coverage_curve
from mui_callback.metrics.utilization import IntArray, ratio

_POINTS = 200
"""Numbers of samples at which a curve is known, at most."""


@dataclass(frozen=True, eq=False)
class DataSetDiversity:
    """What a data set needs of the model, by the number of its samples."""

    n_samples: int
    n_tokens: int
    """Response tokens."""
    curve: CoverageCurve
    """From one sample to all."""
    total: IntervalEstimate | None
    """MUI that ever more samples would come to: Chao2, a lower bound; None for a single sample."""

    @property
    def mui(self) -> float:
        """MUI of all samples."""
        return float(self.curve.mui[-1])

    @property
    def seen(self) -> float | None:
        """MUI of all samples as share of `total`, in [0, 1]; None where there is no total, or it is zero."""
        return None if self.total is None else ratio(self.mui, self.total.value)


@dataclass(frozen=True, eq=False)
class DiversityStudy:
    """Data sets by themselves and side by side."""

    data_sets: Mapping[str, DataSetDiversity]
    comparison: Comparison


def diversity_of(
    sets: Mapping[str, csr_array], n_tokens: Mapping[str, int], *, at: int | None = None, level: float = 0.95
) -> DiversityStudy:
    """The study of data sets whose key neurons are known.

    Args:
        sets: key neurons of each sample of each data set, ``[N, J]``.
        n_tokens: response tokens of each data set.
        at: number of samples to compare at; by default that of the smallest data set.
        level: of the confidence intervals, in (0, 1).

    Raises:
        ValueError: as for `mui_callback.metrics.diversity.compare`.
    """
    comparison = compare(sets, size=at, level=level)
    return DiversityStudy(
        data_sets={
            name: DataSetDiversity(
                n_samples=one.shape[0],
                n_tokens=n_tokens[name],
                curve=coverage_curve(one, _sizes(one.shape[0], comparison.size), level=level),
                total=chao2(one, level=level),
            )
            for name, one in sets.items()
        },
        comparison=comparison,
    )


def _sizes(n_samples: int, at: int) -> IntArray:
    """Numbers of samples from 1 to all, `at` among them; all numbers if they are few."""
    spread = np.linspace(1, n_samples, min(n_samples, _POINTS)).round().astype(np.int64)
    return np.union1d(spread, [at])

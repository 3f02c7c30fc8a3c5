"""Means over seeds and differences between variants, with Student's intervals.

The seeds are draws of what training depends on by chance: the first weights and the order of the data. Variants are
compared seed by seed, since the same seed means the same data in the same order, and the same first weights where the
models have the same modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mui_callback.metrics.rarefaction import t_quantile

LEVEL = 0.95


@dataclass(frozen=True)
class Mean:
    """A mean over seeds."""

    value: float
    reach: float
    """Half of the interval; NaN for a single seed."""
    n: int
    """Seeds."""

    @property
    def low(self) -> float:
        """Lower end."""
        return self.value - self.reach

    @property
    def high(self) -> float:
        """Upper end."""
        return self.value + self.reach


def mean(values: Sequence[float], level: float = LEVEL) -> Mean:
    """The mean of one or more values, and Student's interval of n - 1 degrees of freedom."""
    n = len(values)
    error = float(np.std(values, ddof=1)) / n**0.5 if n > 1 else 0.0
    return Mean(float(np.mean(values)), t_quantile(n - 1, level) * error if n > 1 else float("nan"), n)


def paired(first: Mapping[int, float], second: Mapping[int, float], level: float = LEVEL) -> Mean:
    """How much higher the first is, seed by seed, over the seeds that both have.

    Raises:
        ValueError: they have no seed in common.
    """
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        raise ValueError(f"expected a seed in common, got {sorted(first)} and {sorted(second)}")
    return mean([first[seed] - second[seed] for seed in seeds], level)


def in_words(difference: Mean, unit: str = "", digits: int = 2) -> str:
    """Whether it is a difference, and how large."""
    low, high, where = difference.low, difference.high, f" {unit}".rstrip()
    if difference.n == 1:
        return f"differs by {difference.value:+.{digits}f}{where}; one seed does not tell"
    if low > 0:
        said = f"is higher by {low:.{digits}f} to {high:.{digits}f}{where}"
    elif high < 0:
        said = f"is lower by {-high:.{digits}f} to {-low:.{digits}f}{where}"
    else:
        said = f"cannot be told apart ({low:+.{digits}f} to {high:+.{digits}f}{where})"
    return f"{said}, {difference.n} seeds"

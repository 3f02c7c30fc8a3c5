"""Where the router sends tokens: pure functions of the response tokens that each routed expert of one layer gets.

A token that is sent to k experts counts k times. Experts without neurons (identities) are none here. All are None for a
layer that no token reaches.

Shapes: R routed experts of a layer, or of several for the rank correlation.
"""

from __future__ import annotations

import numpy as np

from mui_callback.metrics.concentration import normalized_entropy
from mui_callback.metrics.utilization import FloatArray, IntArray, ratio


def load_max_ratio(tokens_R: IntArray) -> float | None:
    """Tokens of the busiest expert over the mean of all experts, in [1, R]."""
    return ratio(float(tokens_R.max(initial=0)) * len(tokens_R), float(tokens_R.sum()))


def load_variation(tokens_R: IntArray) -> float | None:
    """Coefficient of variation: standard deviation of the experts' tokens over their mean, in [0, sqrt(R - 1)]."""
    return ratio(float(tokens_R.std()) * len(tokens_R), float(tokens_R.sum())) if len(tokens_R) else None


def router_entropy(tokens_R: IntArray) -> float | None:
    """Normalised entropy H / ln R of where the tokens go, in [0, 1]: 1 if all experts get as many; None for one expert.

    It is the entropy of the choices over all tokens, not that of the router's probabilities for one token.
    """
    return normalized_entropy(tokens_R)


def rank_correlation(first_R: IntArray, second_R: IntArray) -> float | None:
    """Spearman's, in [-1, 1]; equal values share the mean of their ranks. None where one of the two is constant."""
    first, second = (_ranks(values_R) - (len(values_R) + 1) / 2 for values_R in (first_R, second_R))
    covariance = ratio(float(first @ second), float(np.sqrt((first @ first) * (second @ second))))
    return None if covariance is None else float(np.clip(covariance, -1, 1))


def _ranks(values_R: IntArray) -> FloatArray:
    """1 for the lowest."""
    _, value_R, count = np.unique(values_R, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(count) - (count - 1) / 2
    ranks_R: FloatArray = mean_rank[value_R]
    return ranks_R

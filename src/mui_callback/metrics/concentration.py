"""How unevenly a quantity is spread over experts: pure functions of one non-negative amount for each expert.

All are None where the amounts add up to zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mui_callback.metrics.utilization import ratio

Amounts = NDArray[Any]
"""Key neurons (counts) or contribution mass of each expert, ``[E]``."""


def gini(amount_E: Amounts) -> float | None:
    """Gini coefficient: 0 if all experts have the same amount, towards 1 - 1/E if one has all."""
    n = len(amount_E)
    ranked_E = np.sort(amount_E.astype(np.float64))
    weighted = float((ranked_E * (2 * np.arange(1, n + 1) - n - 1)).sum())
    return ratio(weighted, n * float(ranked_E.sum()))


def entropy(amount_E: Amounts) -> float | None:
    """Shannon entropy H of the shares, in nats: 0 if one expert has all, ln E if all have the same."""
    total = float(amount_E.sum())
    if ratio(0.0, total) is None:
        return None
    share_E = amount_E[amount_E > 0] / total
    return max(0.0, float(-(share_E * np.log(share_E)).sum()))


def normalized_entropy(amount_E: Amounts) -> float | None:
    """H / ln E, in [0, 1]; None for a single expert."""
    h = entropy(amount_E)
    return None if h is None else ratio(h, np.log(len(amount_E)))


def effective_experts(amount_E: Amounts) -> float | None:
    """exp(H): the number of experts with equal shares that would have the same entropy, in [1, E]."""
    h = entropy(amount_E)
    return None if h is None else float(np.exp(h))


def expert_diversity(amount_E: Amounts) -> float | None:
    """exp(H) / E, in (0, 1] (the quantity of that name in NeMo Automodel)."""
    effective = effective_experts(amount_E)
    return None if effective is None else effective / len(amount_E)


def top_share(amount_E: Amounts, n: int = 10) -> float | None:
    """Share of the n experts with the highest amounts, in [0, 1]."""
    return ratio(float(np.sort(amount_E)[::-1][:n].sum()), float(amount_E.sum()))

"""How much of the experts a task needs: pure functions of counts (arXiv 2509.23933, section 3).

Shapes: E experts of all layers. A ratio with nothing to divide by is None.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


def ratio(part: float, whole: float) -> float | None:
    """``part / whole``, or None where the whole is zero or either is not a number."""
    if whole == 0 or not np.isfinite(whole) or not np.isfinite(part):
        return None
    return float(part) / float(whole)


def mui(key_neurons_E: IntArray, width_E: IntArray) -> float | None:
    """Share of the neurons of all experts that are key neurons, |U| / neurons, in [0, 1]."""
    return ratio(key_neurons_E.sum(), width_E.sum())


def expert_mui(key_neurons_E: IntArray, width_E: IntArray) -> FloatArray:
    """Share of each expert's own neurons that are key neurons, float64 ``[E]``."""
    return key_neurons_E / width_E


def activated_frequency(activated_E: IntArray, n_samples: int) -> FloatArray:
    """Share of the samples in which each expert owns at least one key neuron, float64 ``[E]``."""
    return activated_E / max(n_samples, 1)


def key_experts(frequency_E: FloatArray, threshold: float) -> BoolArray:
    """Experts whose activated frequency is at least η_expert (0.6 in the paper), bool ``[E]``."""
    return frequency_E >= threshold


def key_expert_mui(expert_mui_E: FloatArray, is_key_E: BoolArray) -> float | None:
    """Mean expert MUI of the key experts; None if there is none."""
    return float(expert_mui_E[is_key_E].mean()) if is_key_E.any() else None


def top_experts(frequency_E: FloatArray, expert_mui_E: FloatArray, n: int = 10) -> IntArray:
    """The n experts with the highest activated frequency, int64 ``[n]``; equals are ordered by expert MUI."""
    return np.lexsort((np.arange(len(frequency_E)), -expert_mui_E, -frequency_E))[:n]

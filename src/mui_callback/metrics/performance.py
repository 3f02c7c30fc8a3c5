"""How well the model does on the probe itself: pure functions of per-sample sums.

Shapes: N samples, C choices of all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mui_callback.metrics.utilization import BoolArray, FloatArray, IntArray, ratio


@dataclass(frozen=True)
class PredictionSums:
    """Sums over samples that say how well the model predicts their responses."""

    loss: float
    """Negative log-likelihood, nats."""
    n_tokens: int
    """Response tokens."""
    n_correct: int
    """Response tokens that are the model's first choice."""
    loss_of_bytes: float
    """The part of `loss` from samples whose bytes are known."""
    n_bytes: int
    """UTF-8 bytes of their responses."""
    n_with_choices: int
    """Samples with choices."""
    n_right: int
    """Those whose best choice is the answer."""


def choice_is_right(
    loss_C: FloatArray, length_C: IntArray, sample_C: IntArray, answer_N: IntArray
) -> tuple[BoolArray, BoolArray]:
    """Which samples have choices, and for which of them the best choice is the answer, bool ``[N]`` each.

    The best choice is the one with the highest log-likelihood divided by its length (``acc_norm`` of
    lm-evaluation-harness); the first wins a tie. A sample with a choice whose likelihood is not finite is not right.

    Args:
        loss_C: negative log-likelihood of each choice (nats).
        length_C: length that it is divided by: UTF-8 bytes, or tokens where the text is not known.
        sample_C: the sample of each choice, ascending.
        answer_N: index of the right choice of each sample, -1 where there are none.
    """
    has_choices_N = answer_N >= 0
    right_N = np.zeros_like(has_choices_N)
    score_C = -loss_C / np.maximum(length_C, 1)
    start_N, end_N = (np.searchsorted(sample_C, np.arange(len(answer_N)), side) for side in ("left", "right"))
    for sample in np.flatnonzero(has_choices_N):
        scores = score_C[start_N[sample] : end_N[sample]]
        right_N[sample] = bool(np.isfinite(scores).all()) and int(scores.argmax()) == answer_N[sample]
    return has_choices_N, right_N


def bits_per_byte(loss: float, n_bytes: int) -> float | None:
    """Loss of all response tokens (nats) as bits per UTF-8 byte of the responses; None if bytes are not known."""
    return ratio(loss / np.log(2), n_bytes)

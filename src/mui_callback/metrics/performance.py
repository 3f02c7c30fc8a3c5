"""How well the model does on the probe itself: pure functions of per-sample sums."""

from __future__ import annotations

import numpy as np

from mui_callback.metrics.utilization import BoolArray, FloatArray, IntArray, ratio


def choice_is_right(
    loss_C: FloatArray, length_C: IntArray, sample_C: IntArray, answer_N: IntArray
) -> tuple[BoolArray, BoolArray]:
    """Which samples have choices, and for which of them the best choice is the answer, bool ``[N]`` each.

    The best choice is the one with the highest log-likelihood divided by its length (``acc_norm`` of
    lm-evaluation-harness); the first wins a tie.

    Args:
        loss_C: negative log-likelihood of each choice (nats).
        length_C: length that it is divided by: UTF-8 bytes, or tokens where the text is not known.
        sample_C: the sample of each choice, ascending.
        answer_N: index of the right choice of each sample, -1 where there are none.
    """
    has_choices_N = answer_N >= 0
    right_N = np.zeros_like(has_choices_N)
    score_C = -loss_C / np.maximum(length_C, 1)
    for sample in np.flatnonzero(has_choices_N):
        scores = score_C[sample_C == sample]
        right_N[sample] = bool(np.isfinite(scores).all()) and int(scores.argmax()) == answer_N[sample]
    return has_choices_N, right_N


def bits_per_byte(loss: float, n_bytes: int) -> float | None:
    """Loss of all response tokens (nats) as bits per UTF-8 byte of the responses; None if bytes are not known."""
    return ratio(loss / np.log(2), n_bytes)

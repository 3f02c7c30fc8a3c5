"""Answers that a model gave: as samples to score, and as a share that is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mui_callback.metrics.resampling import Estimate, ratio_of_sums
from mui_callback.probe.samples import IntArray, TokenSample
from mui_callback.responses.extraction import extract, is_same
from mui_callback.responses.task import Task

Ending = Literal["eos", "stop", "length"]


@dataclass(frozen=True, eq=False)
class GeneratedAnswer:
    """One answer, and what it is worth."""

    id: str
    """Of the sample."""
    prompt_ids: IntArray
    """What the model read, int64 ``[P]``."""
    response_ids: IntArray
    """What it wrote, int64 ``[R]``: with the end-of-sequence token, or up to the stop text. Empty if nothing is before
    either."""
    text: str
    """Before the end-of-sequence token or the stop text; other special tokens are written out."""
    n_bytes: int | None
    """UTF-8 bytes of what the response tokens say, the end-of-sequence token left out; None where that is no text, as
    in the middle of a character."""
    ended: Ending
    """By an end-of-sequence token, by a stop text, or because it was long enough."""
    n_truncated: int = 0
    """Tokens that the prompt has lost from the left."""
    extracted: str | None = None
    """What is compared; None where the answer has no such thing, or nothing is."""
    is_right: bool | None = None
    """None where nothing is compared."""


def judged(answers: Sequence[GeneratedAnswer], task: Task) -> tuple[GeneratedAnswer, ...]:
    """Answers with what `TaskConfig.extract` finds in them, compared with the task's.

    Args:
        answers: one for each sample of the task, in its order.
        task: of `read_task`.

    Raises:
        ValueError: there are answers of other samples.
    """
    _check_ids(answers, task)
    found = [
        extract(task.config.extract, answer.text, sample.choices)
        for answer, sample in zip(answers, task.samples, strict=True)
    ]
    return tuple(
        replace(
            answer,
            extracted=one,
            is_right=None if gold is None else one is not None and is_same(one, gold),
        )
        for answer, one, gold in zip(answers, found, task.answers, strict=True)
    )


def answered_samples(answers: Sequence[GeneratedAnswer], task: Task) -> tuple[TokenSample, ...]:
    """The answers as samples of a probe set: what the model wrote is scored, after what it read.

    An answer without tokens makes a sample with no response token, which a probe counts as such. For an
    encoder-decoder, whose prompt ends where the response begins, `encode` parts them.

    Raises:
        ValueError: as for `judged`.
    """
    _check_ids(answers, task)
    return tuple(
        TokenSample(
            answer.id,
            np.concatenate([answer.prompt_ids, answer.response_ids]),
            np.arange(len(answer.prompt_ids) + len(answer.response_ids)) >= len(answer.prompt_ids),
            n_bytes=answer.n_bytes,
            source=sample.source,
            n_truncated=answer.n_truncated,
        )
        for answer, sample in zip(answers, task.samples, strict=True)
    )


def answer_score(answers: Sequence[GeneratedAnswer]) -> Estimate | None:
    """The share of answers that are right, with what each adds to it; None where nothing is compared."""
    compared = np.array([answer.is_right is not None for answer in answers], dtype=np.float64)
    return ratio_of_sums(np.array([answer.is_right is True for answer in answers], dtype=np.float64), compared)


def _check_ids(answers: Sequence[GeneratedAnswer], task: Task) -> None:
    if [answer.id for answer in answers] != [sample.id for sample in task.samples]:
        raise ValueError(f"task {task.name!r}: expected one answer to each of {len(task.samples)} samples, in order")

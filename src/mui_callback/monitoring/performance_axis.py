"""Which number is the performance of a task: a benchmark's score, or else what the probe itself has measured."""

from __future__ import annotations

from collections.abc import Mapping

from mui_callback.benchmarks.names import clean
from mui_callback.metrics.phases import Point
from mui_callback.metrics.trajectory import kept
from mui_callback.report import MUIReport

BETTER_IF_HIGHER = ("accuracy", "acc_norm", "acc", "exact_match", "em", "f1", "pass_at_1", "bleu", "rouge")
"""Metrics whose direction is known, the one that is preferred first."""


def check_performance(performance: object) -> None:
    """Raises TypeError for what is no mapping of tasks to names of scores."""
    if not isinstance(performance, Mapping) or not all(
        isinstance(task, str | None) and isinstance(score, str) for task, score in performance.items()
    ):
        raise TypeError(
            "performance: expected a mapping of task names (None for all tasks pooled) to names of scores, such as "
            f"{{'gsm8k': 'gsm8k/exact_match'}}, got {performance!r:.80}"
        )


def score_of(task: str | None, given: Mapping[str | None, str], results: Mapping[str, Point]) -> str | None:
    """The name of the score that is the performance of a task, with ``-`` before it where lower is better.

    It is the one that is given for the task; or else one with the name of the task, or the first of
    ``<task>/accuracy`` and other metrics that are known to be better if they are higher.

    Args:
        task: its name; None for all tasks pooled, for which no score is looked for.
        given: names of scores by task.
        results: the scores that there are.

    Returns:
        None where there is no such score.
    """
    if task in given:
        name = given[task]
        return name if name.removeprefix("-") in results else None
    if task is None:
        return None
    own = clean(task)
    candidates = (own, *(f"{own}/{metric}" for metric in BETTER_IF_HIGHER))
    exact = next((name for name in candidates if name in results), None)
    # lm-evaluation-harness puts the name of a filter behind the metric
    filtered = (name for metric in candidates[1:] for name in results if name.startswith(f"{metric}_"))
    return exact or next((name for name in filtered if not name.endswith("_stderr")), None)


def from_score(score: str, results: Mapping[str, Point]) -> tuple[str, Point]:
    """The axis ``benchmark/<name>`` and what a benchmark measured; higher is better.

    Args:
        score: as `score_of` names it.
        results: the scores that there are.
    """
    name, sign = signed(score)
    return f"{'-' if sign < 0 else ''}benchmark/{name}", kept(results[name], sign)


def signed(name: str) -> tuple[str, int]:
    """The name of a score, and -1 where lower is better."""
    return (name[1:], -1) if name.startswith("-") else (name, 1)


def from_probe(report: MUIReport, task: str | None) -> tuple[str, Point] | None:
    """Choice accuracy, where all samples of the task have choices, or else the negative loss; higher is better."""
    accuracy = report.estimate("choice_accuracy", task)
    if accuracy is not None and accuracy.counts.all():
        return "choice_accuracy", kept(accuracy)
    loss = report.estimate("loss", task)
    return None if loss is None else ("-loss", kept(loss, -1))

"""Performance and MUI of each task at a checkpoint, whatever performance was measured by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

from mui_callback.errors import MUIError
from mui_callback.metrics.phases import Point
from mui_callback.metrics.trajectory import TrajectoryPoint, kept
from mui_callback.monitoring.performance_axis import from_probe, from_score, score_of
from mui_callback.report import MUIReport
from mui_callback.responses.answers import GeneratedAnswer, answer_score

ANSWERED = "answer_accuracy"
"""The axis of performance where models have given answers that are right or wrong."""


def points_of(
    report: MUIReport,
    scores: Mapping[str, Point],
    answers: Mapping[str, Sequence[GeneratedAnswer]],
    performance: Mapping[str, str],
) -> dict[str | None, TrajectoryPoint]:
    """By task, and of all tasks pooled (None). Performance is a benchmark's score that belongs to the task; or else the
    share of the model's answers that are right; or else what the probe has measured.

    Args:
        report: of the probe.
        scores: of lm-evaluation-harness.
        answers: of the model, by task, where it gave some.
        performance: names of scores by task, where they do not follow from its name.

    Raises:
        MUIError: there is no score of such a name.
    """
    given: dict[str | None, str] = dict(performance.items())
    points: dict[str | None, TrajectoryPoint] = {}
    for task in (None, *report.task_names):
        score = score_of(task, given, scores)
        if task in given and score is None:
            raise MUIError(f"performance: lm-eval gave no {given[task]!r}; it gave {', '.join(scores) or 'nothing'}")
        own = [*chain.from_iterable(answers.values())] if task is None else answers.get(task, ())
        right, mui = answer_score(own), report.estimate("mui", task)
        if score is not None:
            measured: tuple[str, Point] | None = from_score(score, scores)
        else:
            measured = from_probe(report, task) if right is None else (ANSWERED, kept(right))
        if mui is not None and measured is not None:
            points[task] = TrajectoryPoint(*measured, kept(mui))
    return points

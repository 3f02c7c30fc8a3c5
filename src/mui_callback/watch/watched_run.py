"""The run to be shown, put together from the parts that a record has of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mui_callback.metrics.catalogue import key
from mui_callback.sinks.record import RecordedRun
from mui_callback.spent import Spent

_ENOUGH = 4
"""Points for a trend without that of step 0."""


@dataclass(frozen=True)
class WatchedRun:
    """The last run of a record, with what was trained before a pause."""

    id: str
    place: int
    """Among the runs of the record, from 1 on."""
    n_runs: int
    n_parts: int
    """How often it was started."""
    probed: dict[str, Any]
    points: dict[int, dict[str, float]]
    """Scalars by step, in the order of the steps."""
    spent: Spent
    top_experts: list[dict[str, Any]]
    troubles: list[tuple[int, str]]
    alerts: list[tuple[int, str]]
    last_time: float | None

    @property
    def task_names(self) -> list[str]:
        return list(self.probed["tasks"])

    def series(self, metric: str, task: str | None = None) -> list[float]:
        """The values so far, where there are any.

        Once there are others, that of the untrained model is left out: it would make all others look alike.
        """
        name = key(metric, task)
        values = {step: scalars[name] for step, scalars in self.points.items() if name in scalars}
        if len(values) >= _ENOUGH:
            values.pop(0, None)
        return list(values.values())

    def last(self, metric: str, task: str | None = None) -> float | None:
        """At the last point that is complete; None where that has no answer."""
        name = key(metric, task)
        complete = [scalars for scalars in self.points.values() if key("mui") in scalars]
        return complete[-1].get(name) if complete else None

    def accuracy(self, task: str | None) -> float | None:
        """That of choices, if all samples have them, or else that of tokens."""
        has_choices = [self.last("choice_accuracy", name) is not None for name in self.task_names]
        choices = self.last("choice_accuracy", task) if task is not None or all(has_choices) else None
        return self.last("token_accuracy", task) if choices is None else choices

    def benchmarks(self) -> dict[str, float]:
        """The last score of each."""
        prefix = key("benchmark/")
        scores: dict[str, float] = {}
        for scalars in self.points.values():
            scores |= {name.removeprefix(prefix): value for name, value in scalars.items() if name.startswith(prefix)}
        return {name: value for name, value in scores.items() if not name.endswith("_stderr")}


def last_run(runs: list[RecordedRun]) -> WatchedRun | None:
    """The run that was started, or went on, last; None in a record without runs."""
    if not runs:
        return None
    ids = list(dict.fromkeys(run.id for run in runs))
    parts = [run for run in runs if run.id == runs[-1].id]
    points: dict[int, dict[str, float]] = {}
    for part in parts:
        points |= {step: points.get(step, {}) | scalars for step, scalars in part.points.items()}
    told = [part for part in parts if part.last_time is not None] or parts
    return WatchedRun(
        id=runs[-1].id,
        place=ids.index(runs[-1].id) + 1,
        n_runs=len(ids),
        n_parts=len(parts),
        probed=parts[-1].probed,
        points=dict(sorted(points.items())),
        spent=told[-1].spent,
        top_experts=next((part.top_experts for part in reversed(parts) if part.top_experts), []),
        troubles=[trouble for part in parts for trouble in part.troubles],
        alerts=[alert for part in parts for alert in part.alerts],
        last_time=told[-1].last_time,
    )

"""The table of a study: a row for each checkpoint and task, and the Parquet file that holds all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from mui_callback.metrics.catalogue import CATALOGUE, Scope
from mui_callback.metrics.phases import EXACT_SAMPLES, Point
from mui_callback.metrics.rarefaction import t_quantile
from mui_callback.metrics.resampling import Estimate
from mui_callback.metrics.trajectory import TrajectoryPoint
from mui_callback.report import MUIReport
from mui_callback.sample_results import ESTIMATED
from mui_callback.samples_table import write_parquet
from mui_callback.trajectory.checkpoint import CheckpointId
from mui_callback.trajectory.points import ANSWERED
from mui_callback.trajectory.records import Row

_METRICS = tuple(
    metric.name
    for metric in CATALOGUE
    if metric.scope in (Scope.TASK, Scope.POOLED, Scope.REPORT) and not metric.name.endswith(("_low", "_high"))
)
_NAMES = ("model", "checkpoint", "task", "response", "performance_axis", "score")
_OF_PERFORMANCE = ("performance_axis", "higher_is_better", "performance", "performance_low", "performance_high")
_NUMBERS = ("step", "n_samples", "n_tokens")


def rows_of(
    checkpoint: CheckpointId, report: MUIReport, points: Mapping[str | None, TrajectoryPoint], *, response: str
) -> list[Row]:
    """One row for each task.

    Args:
        checkpoint: whose they are.
        report: of the probe.
        points: of each task that has an answer.
        response: what was scored.
    """
    rows = []
    for task in report.task_names:
        metrics = _metrics(report, task)
        row: Row = {
            **_place(checkpoint),
            "task": task,
            "response": response,
            **_performance(points.get(task), metrics),
            "n_samples": report.tasks[task].n_samples,
            "n_tokens": report.tasks[task].predictions.n_tokens,
        }
        rows.append(row | metrics)
    return rows


def scores_of(checkpoint: CheckpointId, scores: Mapping[str, Point]) -> list[Row]:
    """One row for each score of a benchmark."""
    return [
        {**_place(checkpoint), "score": name, "value": score.value, "standard_error": score.standard_error}
        for name, score in scores.items()
    ]


def write_rows(file: Path, rows: Sequence[Row]) -> None:
    """Write all rows as Parquet; replaces the file at once.

    Raises:
        ImportError: pyarrow is not installed.
        OSError: it cannot be written.
    """
    import pyarrow as pa

    names = list(dict.fromkeys(name for row in rows for name in row))
    kinds = {
        "higher_is_better": pa.bool_(),
        **dict.fromkeys(_NAMES, pa.string()),
        **dict.fromkeys(_NUMBERS, pa.int64()),
    }
    columns = {name: pa.array([row.get(name) for row in rows], kinds.get(name, pa.float64())) for name in names}
    write_parquet(file, pa.table(columns))


def _place(checkpoint: CheckpointId) -> Row:
    return {
        "model": checkpoint.model,
        "checkpoint": checkpoint.label,
        "step": checkpoint.step,
        "tokens": checkpoint.tokens,
    }


def _performance(point: TrajectoryPoint | None, metrics: Mapping[str, float | None]) -> dict[str, Any]:
    """As it is read, whichever way is better: a loss is the loss."""
    if point is None:
        return dict.fromkeys(_OF_PERFORMANCE)
    name, sign = point.axis.removeprefix("-"), -1 if point.axis.startswith("-") else 1
    if f"{name}_low" in metrics:
        low, high = metrics[f"{name}_low"], metrics[f"{name}_high"]
    else:
        low, high = (_within(end, name) for end in _interval(point.performance, sign))
    return {
        "performance_axis": name,
        "higher_is_better": sign > 0,
        "performance": sign * point.performance.value,
        "performance_low": low,
        "performance_high": high,
    }


def _interval(performance: Point, sign: int) -> tuple[float | None, float | None]:
    error = performance.standard_error
    if error is None:
        return None, None
    freedom = len(performance.influence) - 1 if isinstance(performance, Estimate) else EXACT_SAMPLES
    half = error * t_quantile(freedom, 0.95)
    return sign * performance.value - half, sign * performance.value + half


def _within(end: float | None, name: str) -> float | None:
    """A share of right answers is in [0, 1]."""
    return end if end is None or name != ANSWERED else min(max(end, 0.0), 1.0)


def _metrics(report: MUIReport, task: str) -> dict[str, float | None]:
    found: dict[str, Any] = {name: getattr(report.tasks[task], name) for name in _METRICS}
    for metric, interval in report.intervals(task, metrics=ESTIMATED).items():
        for end in ("low", "high"):
            found[f"{metric}_{end}"] = None if interval is None else getattr(interval, end)
    return {name: None if value is None or not isfinite(value) else float(value) for name, value in found.items()}

"""What a report needs of the probe of each checkpoint, which is read once and not kept whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from mui_callback.html_report.progress import Progress
from mui_callback.metrics.rarefaction import CoverageCurve, coverage_curve
from mui_callback.report import MUIReport
from mui_callback.settings import ProbeSettings
from mui_callback.task_report import TaskReport
from mui_callback.trajectory.checkpoint import CheckpointId
from mui_callback.trajectory.records import CheckpointRecord, Study

_CURVE_POINTS = 100


@dataclass(frozen=True, eq=False)
class Measured:
    """One checkpoint."""

    record: CheckpointRecord
    x: float
    """How far in training it is, in what the study is counted in."""
    settings: ProbeSettings
    pooled: TaskReport
    tasks: Mapping[str, TaskReport]
    pooled_mui: tuple[float, float] | None
    """The interval of the MUI of all tasks pooled."""
    curves: Mapping[str, CoverageCurve]
    """By task, of the last checkpoint of a model only."""

    @property
    def checkpoint(self) -> CheckpointId:
        """Which it is."""
        return self.record.checkpoint


def measured(study: Study, progress: Progress, level: float) -> dict[str, list[Measured]]:
    """By model, the earliest checkpoint first.

    Args:
        study: as it is on the disk.
        progress: what its checkpoints are counted in.
        level: of the intervals of coverage curves.

    Raises:
        MUIError: a report is none.
        OSError: a report cannot be read.
    """
    found = {}
    for model in study.models:
        of_model = [one for one in study.planned if one.model == model]
        places = [(progress.at(one.checkpoint, of_model.index(one.checkpoint)), one) for one in study.of(model)]
        places.sort(key=lambda place: place[0])
        last = places[-1][1]
        found[model] = [_read(record, x, level if record is last else None) for x, record in places]
    return found


def _read(record: CheckpointRecord, x: float, curve_level: float | None) -> Measured:
    report = replace(record).report  # the record would keep it
    interval = report.intervals(metrics=("mui",))["mui"]
    return Measured(
        record=record,
        x=x,
        settings=report.settings,
        pooled=report.pooled,
        tasks=dict(report.tasks),
        pooled_mui=None if interval is None else (interval.low, interval.high),
        curves={} if curve_level is None else _curves(report, curve_level),
    )


def _curves(report: MUIReport, level: float) -> dict[str, CoverageCurve]:
    sets, curves = report.key_neuron_sets(), {}
    for number, task in enumerate(report.task_names):
        n_samples = int((report.sample_table.task == number).sum())
        if n_samples:
            sizes = np.unique(np.linspace(1, n_samples, min(n_samples, _CURVE_POINTS)).round().astype(np.int64))
            curves[task] = coverage_curve(sets[report.sample_table.task == number], sizes, level=level)
    return curves

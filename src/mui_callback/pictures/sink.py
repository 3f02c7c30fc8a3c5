"""Pictures of every probe, drawn beside the training and logged to W&B."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from mui_callback.forgiving import attempt
from mui_callback.metrics.catalogue import key
from mui_callback.pictures.media import as_media, as_table, can_draw
from mui_callback.pictures.paths import Paths
from mui_callback.pictures.scene import MOST_PANELS, Pictures, Scene, check_pictures
from mui_callback.pictures.studio import Studio
from mui_callback.pictures.walls import Hang, Wall, walls_of
from mui_callback.pictures.worker import Worker
from mui_callback.probe.freeze import random_state_kept
from mui_callback.report import MUIReport
from mui_callback.sample_results import EstimatedMetric
from mui_callback.sinks.base import ProbePoint, RunDescription, Sink

logger = logging.getLogger(__name__)

_PATIENCE = 30.0
"""Seconds for the last pictures, at the end of training."""
_WITH_INTERVALS: tuple[EstimatedMetric, ...] = ("mui", "loss", "choice_accuracy")
"""The axes of a trajectory that are found by the probe."""
_Drawing = tuple[Sequence[Hang], Scene]
_Hung = tuple[Sequence[Hang], Mapping[str, Any]]


class PictureSink:
    """Has pictures drawn of each point by another process (see `Studio`), and logs those that are finished.

    A point is only handed over while it is written. Finished pictures are logged by the training thread, at the next
    step or the next point: a row that comes at any time could end one that the training loop has begun. They have the x
    of their point. If points come faster than pictures are drawn, those of the points between are left out.

    Args:
        walls: where they are hung. Without a run there nothing is drawn.
        pictures: True, of each point; ``"end"``, of the last one; False, none.
        tables: whether a table of the experts is logged after the last point.
        is_crowded: whether the training loop may count W&B's rows itself (``step=``). Then there is at most one of ours
            at each step, of the point or of pictures; a loop that is probed at each step has them at its end.
    """

    name = "pictures"
    is_optional = True
    """What it raises is told, and no more, also with ``on_error="raise"``."""

    def __init__(
        self, walls: Sequence[Wall], *, pictures: Pictures = True, tables: bool = False, is_crowded: bool = False
    ) -> None:
        check_pictures(pictures, tables)
        self._walls = tuple(walls)
        self._pictures = pictures
        self._tables = tables
        self._is_crowded = is_crowded
        self._logged: dict[int, dict[str, float]] = {}
        self._axes: dict[str | None, str] = {}
        self._paths = Paths()
        self._latest: _Drawing | None = None
        self._worker: Worker[_Drawing, _Hung] | None = None
        self._studio = Studio()
        self._can_draw: bool | None = None

    def open(self, run: RunDescription) -> None:
        """Remember the points before, where training goes on."""
        self._logged = {step: dict(scalars) for step, scalars in run.points_before.items()}

    def write(self, point: ProbePoint) -> None:
        """Hand the point over; a failed probe has no pictures."""
        if point.error is not None:
            return
        self._logged.setdefault(point.step, {}).update(point.scalars)
        self._paths.forget(point.step)
        self._axes |= {task: phase.point.axis for task, phase in point.phases.items()}
        places = [place for wall in self._walls if (place := wall.place(point.step)) is not None]
        if point.report is not None and places:
            if self._pictures:
                self._logged[point.step] |= _missing_ends(point.report, point.scalars)
            scene = self._scene(point, point.report)
            if self._pictures is True:
                self._submit((places, scene))
            if self._pictures == "end" or self._tables:
                self._latest = places, scene
        if not self._is_crowded:
            self.between_points()

    def between_points(self) -> None:
        """Log what is finished.

        Raises:
            Exception: whatever was raised when it was drawn, or logged.
        """
        if self._worker is not None and self._worker.has_news:
            with random_state_kept():
                self._hang_finished(self._worker, is_end=False)

    def _hang_finished(self, worker: Worker[_Drawing, _Hung], *, is_end: bool) -> None:
        finished, error = worker.take()
        if self._is_crowded:
            finished = finished[-1:]
        jobs = [(*job, is_end and number == len(finished)) for number, job in enumerate(finished, start=1)]
        errors = [error, *(_hang(places, values, is_end=is_last) for places, values, is_last in jobs)]
        _raise(_first(errors))

    def close(self) -> None:
        """Log the last pictures, and the table if one is wanted.

        Raises:
            TimeoutError: the last pictures are not drawn within 30 s.
            Exception: see `between_points`.
        """
        latest, self._latest = self._latest, None
        if latest is not None and self._pictures == "end":
            self._submit(latest)
        try:
            self._hang_the_last()
        finally:
            if latest is not None and self._tables:
                places, scene = latest
                _raise(_hang(places, as_table(scene), is_end=True))

    def _hang_the_last(self) -> None:
        worker, self._worker = self._worker, None
        if worker is None:
            return
        try:
            is_done = worker.close(_PATIENCE)
        finally:
            self._studio.close()
        if worker.n_dropped:
            logger.info("MUI: %d points came faster than their pictures were drawn, and have none", worker.n_dropped)
        self._hang_finished(worker, is_end=True)
        if not is_done:
            raise TimeoutError(f"the last pictures are not drawn after {_PATIENCE:g} s; they are left out")

    def _submit(self, job: _Drawing) -> None:
        if self._can_draw is None:
            self._can_draw = can_draw()
        if self._can_draw:
            self._worker = self._worker or Worker(self._draw, "mui-pictures")
            self._worker.submit(job)

    def _draw(self, job: _Drawing) -> _Hung:
        """Run by the worker."""
        places, scene = job
        return places, as_media(scene, self._studio.draw(scene))

    def _scene(self, point: ProbePoint, report: MUIReport) -> Scene:
        tasks = report.task_names
        whole = (None, *tasks) if len(tasks) > 1 else tasks
        paths = (self._paths.of(task, self._axes[task], self._logged) for task in whole if task in self._axes)
        return Scene(
            point.step, report.pooled, {name: report.tasks[name] for name in tasks}, tuple(p for p in paths if p.points)
        )


def pictures_at(
    trackers: Sequence[Sink], *, pictures: Pictures, tables: bool, is_crowded: bool = False
) -> list[PictureSink]:
    """The sink that hangs pictures where these trackers log, if there is anything for it to do; see `PictureSink`."""
    walls = walls_of(trackers)
    wanted = bool(walls) and (pictures is not False or tables)
    return [PictureSink(walls, pictures=pictures, tables=tables, is_crowded=is_crowded)] if wanted else []


def _missing_ends(report: MUIReport, scalars: Mapping[str, float]) -> dict[str, float]:
    """The intervals of MUI and of performance that are not logged: those of each task, and of accuracy."""
    ends: dict[str, float] = {}
    for task in (None, *report.task_names)[:MOST_PANELS]:
        missing = [metric for metric in _WITH_INTERVALS if f"{key(metric, task)}_low" not in scalars]
        for metric, interval in report.intervals(task, metrics=missing).items():
            if interval is not None:
                ends |= {f"{key(metric, task)}_{end}": getattr(interval, end) for end in ("low", "high")}
    return ends


def _hang(places: Sequence[Hang], values: Mapping[str, Any], *, is_end: bool) -> Exception | None:
    """At all of them; the first exception, if any."""
    return _first([attempt(partial(place, values, is_end))[1] for place in places])


def _first(errors: Iterable[Exception | None]) -> Exception | None:
    return next((error for error in errors if error is not None), None)


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error

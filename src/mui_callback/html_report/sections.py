"""The figures of a report, section by section."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from mui_callback.html_report.album import Album, Drawn
from mui_callback.html_report.measured import Measured
from mui_callback.html_report.progress import Progress
from mui_callback.html_report.routes import POOLED, Route
from mui_callback.metrics.catalogue import metric_named
from mui_callback.pictures.coverage import coverage_curves
from mui_callback.pictures.curves import Line, Panel, curves, dots
from mui_callback.pictures.planes import Plane, planes
from mui_callback.pictures.scene import MOST_PANELS
from mui_callback.pictures.style import shortened
from mui_callback.pictures.top_experts import top_experts_bars
from mui_callback.pictures.trajectories import trajectories
from mui_callback.task_report import TaskReport

KEY_EXPERTS = {
    "key_expert_proportion": "Key expert proportion",
    "key_expert_mui": "Expert MUI of key experts",
    "effective_experts": "Effective number of experts",
    "expert_gini": "Gini coefficient over experts",
    "top10_share": "Key neurons in the top ten experts",
    "routing_rank_correlation": "Routing against use, rank correlation",
}
SHARED = {
    "shared_share": "Key neurons in shared experts",
    "shared_mass_share": "Contribution of shared experts",
    "shared_fair_ratio": "Shared share over share of neurons",
    "shared_in_top10": "Shared experts in the top ten",
}
_MOST_BARS = 12
"""Figures of top experts for one model."""
_MOST_CURVES = 6
"""In one figure."""
_NAME_WIDTH = 190
Found = Mapping[str, Sequence[Measured]]
_One = TypeVar("_One")


def trajectory_figures(album: Album, routes: Sequence[Route], progress: Progress) -> list[Drawn]:
    """MUI against performance: of all models side by side, and of each that has several checkpoints, with phases."""
    drawn: list[Drawn] = []
    models = list(dict.fromkeys(route.model for route in routes))
    if len(models) > 1:
        drawn += _side_by_side(album, routes)
    for model in models:
        paths = [route.path for route in routes if route.model == model]
        if len(models) > 1 and all(len(path.points) < 2 for path in paths):
            continue
        for page, some in _pages(paths, MOST_PANELS):
            alt = "; ".join(
                f"{path.task}: {len(path.points)} points, MUI {100 * path.points[0].mui:.3g} to "
                f"{100 * path.points[-1].mui:.3g} %, {path.points[-1].phase.value} at the end"
                for path in some
            )
            figure = trajectories(some, title=f"MUI against performance: {model}", subtitle=_counted(progress))
            drawn.append(album.add(f"trajectory-{model}{page}", figure, f"MUI against performance of {model}. {alt}."))
    return drawn


def _side_by_side(album: Album, routes: Sequence[Route]) -> Iterator[Drawn]:
    shown: dict[tuple[str, str], Plane] = {}
    for route in routes:  # tasks that models have on different axes are in different panels
        axis = route.path.axis
        several = len({one.path.axis for one in routes if one.name == route.name}) > 1
        title = f"{route.name} ({axis.removeprefix('-')})" if several else route.name
        plane = shown.setdefault((route.name, axis), Plane(title, axis, {}))
        shown[route.name, axis] = Plane(title, axis, {**plane.paths, route.model: route.path})
    for page, some in _pages(list(shown.values()), MOST_PANELS):
        figure = planes(some, title="Models side by side", subtitle="the large dot is the last checkpoint")
        names = ", ".join(plane.title for plane in some)
        yield album.add(f"models{page}", figure, f"MUI against performance of all models, on {names}.")


def mui_figures(album: Album, found: Found, tasks: Sequence[str], progress: Progress, level: float) -> list[Drawn]:
    """MUI of each task over training, with intervals."""
    several = len(tasks) > 1
    panels = [Panel(POOLED, "MUI, %", [_of_pooled(model, one) for model, one in found.items()])] if several else []
    panels += [
        Panel(task, "MUI, %", [_of_rows(model, one, task, "mui") for model, one in found.items()]) for task in tasks
    ]
    title = f"MUI of each task, with {100 * level:g} % intervals"
    return list(_over_training(album, "mui", panels, title, "the samples that a task has", progress))


def metric_figures(
    album: Album, name: str, title: str, metrics: Mapping[str, str], found: Found, progress: Progress
) -> list[Drawn]:
    """Metrics over training: a panel for each, and of a single model a line for each task; of several, one for each
    model, all tasks pooled. Those without a value anywhere are left out."""
    panels = []
    for metric, words in metrics.items():
        lines = _of_metric(metric, found)
        if any(np.isfinite(line.y).any() for line in lines):
            panels.append(Panel(words, _unit(metric), lines))
    what = POOLED if len(found) > 1 else f"each task of {next(iter(found))}"
    return list(_over_training(album, name, panels, title, what, progress)) if panels else []


def _of_metric(metric: str, found: Found) -> list[Line]:
    if len(found) > 1:
        return [
            _line(model, of_model, [getattr(one.pooled, metric) for one in of_model], metric)
            for model, of_model in found.items()
        ]
    (of_model,) = found.values()
    tasks = list(dict.fromkeys(task for one in of_model for task in one.tasks))
    return [
        _line(
            task,
            of_model,
            [getattr(one.tasks[task], metric) if task in one.tasks else None for one in of_model],
            metric,
        )
        for task in tasks
    ]


def _over_training(
    album: Album, name: str, panels: Sequence[Panel], title: str, subtitle: str, progress: Progress
) -> Iterator[Drawn]:
    is_single = all(len(line.x) < 2 for panel in panels for line in panel.lines)
    for page, some in _pages(panels, MOST_PANELS):
        figure = (
            dots(some, title=title, subtitle=subtitle)
            if is_single
            else curves(some, title=title, subtitle=subtitle, x_label=progress.label, x_words=progress.words)
        )
        yield album.add(f"{name}{page}", figure, f"{title}: {'; '.join(_ends(panel) for panel in some)}.")


def bars_of(album: Album, model: str, last: Measured, where: str) -> list[tuple[str, Drawn | None]]:
    """The ten most frequently activated experts of all tasks pooled and of each; from the thirteenth on, no figure."""
    reports: dict[str, TaskReport] = {POOLED: last.pooled} if len(last.tasks) > 1 else {}
    reports |= last.tasks
    drawn: list[tuple[str, Drawn | None]] = []
    for place, (task, report) in enumerate(reports.items()):
        if place >= _MOST_BARS:
            drawn.append((task, None))
            continue
        top = ", ".join(f"{label} {100 * frequency:.0f} %" for label, frequency, _ in report.top_experts(3))
        figure = top_experts_bars(
            report,
            title=shortened(f"Top experts: {task}", 730, 13, "bold"),
            subtitle=shortened(f"{model}, {where} ({report.n_samples:,} samples)", 730, 9.5),
        )
        alt = f"The most frequently activated experts of {model} on {task}: {top} of the samples, and so on."
        drawn.append((task, album.add(f"top-experts-{model}-{task}", figure, alt)))
    return drawn


def coverage_figures(album: Album, found: Found, level: float) -> list[Drawn]:
    """Coverage curves of the tasks, at the last checkpoint of each model."""
    drawn = []
    for model, of_model in found.items():
        for page, some in _pages(list(of_model[-1].curves.items()), _MOST_CURVES):
            named = {_distinct(task, place): curve for place, (task, curve) in enumerate(some)}
            title = shortened(model, 900, 11)
            figure = coverage_curves(named, level=level, title=title)
            ends = "; ".join(f"{task} {100 * curve.mui[-1]:.3g} % of {curve.n_samples} samples" for task, curve in some)
            drawn.append(
                album.add(f"coverage-{model}{page}", figure, f"MUI by the number of samples, {model}. {ends}.")
            )
    return drawn


def _of_rows(model: str, of_model: Sequence[Measured], task: str, metric: str) -> Line:
    rows = [next((row for row in one.record.rows if row["task"] == task), {}) for one in of_model]
    scale = _scale(metric)
    values, low, high = (
        scale * np.array([row.get(name) for row in rows], dtype=np.float64)
        for name in (metric, f"{metric}_low", f"{metric}_high")
    )
    return Line(model, _x(of_model), values, low, high)


def _of_pooled(model: str, of_model: Sequence[Measured]) -> Line:
    ends = np.array([one.pooled_mui or (np.nan, np.nan) for one in of_model], dtype=np.float64)
    values = np.array([one.pooled.mui for one in of_model], dtype=np.float64)
    return Line(model, _x(of_model), 100 * values, 100 * ends[:, 0], 100 * ends[:, 1])


def _line(name: str, of_model: Sequence[Measured], values: Sequence[Any], metric: str) -> Line:
    return Line(name, _x(of_model), _scale(metric) * np.array(values, dtype=np.float64))


def _x(of_model: Sequence[Measured]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([one.x for one in of_model], dtype=np.float64)


def _scale(metric: str) -> float:
    return 100.0 if metric_named(metric).unit == "share" else 1.0


def _unit(metric: str) -> str:
    unit = metric_named(metric).unit
    return {"share": "%", "1": ""}.get(unit, unit)


def _ends(panel: Panel) -> str:
    words = []
    for line in panel.lines[:_MOST_BARS]:
        known = line.y[np.isfinite(line.y)]
        if len(known):
            words.append(
                f"{line.name} {known[0]:.3g} to {known[-1]:.3g}" if len(known) > 1 else f"{line.name} {known[0]:.3g}"
            )
    return f"{panel.title} ({panel.unit or 'no unit'}): {', '.join(words) or 'no value'}"


def _counted(progress: Progress) -> str:
    return f"labels are {progress.label}; right is better, up is more of the model"


def _distinct(task: str, place: int) -> str:
    """A name that is short and is no other's, as names that differ in the middle only may become alike."""
    short = shortened(task, _NAME_WIDTH, 10)
    return task if short == task else f"{place + 1}: {short}"


def _pages(things: Sequence[_One], most: int) -> Iterator[tuple[str, Sequence[_One]]]:
    """As many at a time as fit, and what tells the files of the pages apart."""
    for start in range(0, len(things), most):
        yield (f"-{start // most + 1}" if len(things) > most else ""), things[start : start + most]

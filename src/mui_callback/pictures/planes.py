"""Models side by side in the plane of performance and MUI, as a table of arXiv 2509.23933 has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mui_callback.pictures import style
from mui_callback.pictures.panels import Stroke, draw_gap, panelled, spread, strokes
from mui_callback.pictures.paths import Path
from mui_callback.pictures.trajectories import words_of_axis


@dataclass(frozen=True)
class Plane:
    """One task of several models, all on one axis of performance."""

    title: str
    axis: str
    paths: Mapping[str, Path]
    """By model."""


def planes(drawn: Sequence[Plane], *, title: str, subtitle: str) -> Figure:
    """A panel for each task and a path for each model; its last point is large, and has its intervals.

    Args:
        drawn: at most as many as fit on a page.
        title: above it.
        subtitle: below that.
    """
    styles = strokes([model for plane in drawn for model in plane.paths])
    figure, places = panelled([plane.title for plane in drawn], title=title, subtitle=subtitle, legend=styles)
    for axes, plane in zip(places, drawn, strict=True):
        style.label(axes, x=words_of_axis(plane.axis), y="MUI, %")
        for model, path in plane.paths.items():
            if path.points:
                _draw_path(axes, path, styles[model])
        points = [point for path in plane.paths.values() for point in path.points]
        if not points:
            draw_gap(axes)
        x_low, x_high = spread(np.array([point.performance for point in points]))
        lasts = [path.points[-1] for path in plane.paths.values() if path.points]
        ends = [end for point in lasts for end in point.mui_interval or ()]
        y_low, y_high = spread(100 * np.array([*(point.mui for point in points), *ends]))
        is_inverted = plane.axis.startswith("-")
        axes.set(xlim=(x_high, x_low) if is_inverted else (x_low, x_high), ylim=(max(y_low, 0.0), y_high))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
    return figure


def _draw_path(axes: Any, path: Path, stroke: Stroke) -> None:
    x, y = np.array([(point.performance, 100 * point.mui) for point in path.points]).T
    axes.plot(
        x, y, color=stroke.color, linestyle=stroke.dashes, linewidth=1.2, marker=stroke.marker, markersize=3.5,
        alpha=0.75, gid="path",
    )  # fmt: skip
    last = path.points[-1]
    if last.mui_interval is not None:
        axes.vlines(x[-1], *(100 * end for end in last.mui_interval), color=stroke.color, linewidth=1, gid="interval")
    axes.plot(
        x[-1],
        y[-1],
        stroke.marker,
        color=stroke.color,
        markersize=9,
        markeredgecolor="white",
        markeredgewidth=0.9,
        gid="latest",
    )

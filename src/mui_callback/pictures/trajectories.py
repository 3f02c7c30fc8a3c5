"""MUI against performance: the figure in which arXiv 2509.23933 shows how training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from mui_callback.metrics.phases import Phase
from mui_callback.metrics.utilization import FloatArray
from mui_callback.pictures import style
from mui_callback.pictures.palette import PHASE_COLORS, PHASE_MARKERS
from mui_callback.pictures.paths import Path, PathPoint

MOST_PANELS = 9
_PANEL_WIDTH, _PANEL_HEIGHT = 330, 250
_LEFT, _RIGHT, _BOTTOM, _TOP, _BETWEEN = 64, 26, 100, 84, (84, 92)
_MOST_INTERVALS = 24
"""Of more points only the last one's is drawn."""
_MOST_LABELS = 6
_WAYS = np.array([(1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.8), (0.8, -0.8), (-0.8, 0.8), (-0.8, -0.8)])
"""Where the label of a step may be, seen from its point; the best first."""
_OVERLAP = 1000
_MEANING = {
    Phase.EVOLVING: "evolving: better, by less",
    Phase.ACCUMULATING: "accumulating: better, by more",
    Phase.UNDECIDED: "undecided",
    Phase.COARSENING: "coarsening: worse, by more",
    Phase.COLLAPSING: "collapsing: worse, by less",
}


def trajectories(paths: Sequence[Path], *, title: str, subtitle: str) -> Figure:
    """The path of each task, to the right where performance is better and up where MUI is higher; a band along it, and
    the marks on it, have the colour of the phase that was called there. The last point has a ring.

    Args:
        paths: one for each panel; the first 9 are drawn.
        title: above it.
        subtitle: below that.
    """
    drawn = paths[:MOST_PANELS]
    n_columns = min(3, max(1, len(drawn))) if len(drawn) != 4 else 2
    n_rows = max(1, -(-len(drawn) // n_columns))
    step_x, step_y = _PANEL_WIDTH + _BETWEEN[0], _PANEL_HEIGHT + _BETWEEN[1]
    width = max(_LEFT + n_columns * step_x - _BETWEEN[0] + _RIGHT, 700)
    height = _BOTTOM + n_rows * step_y - _BETWEEN[1] + _TOP
    figure = style.blank(width, height, title, subtitle)
    for place, path in enumerate(drawn):
        row, column = divmod(place, n_columns)
        left, bottom = _LEFT + column * step_x, _BOTTOM + (n_rows - 1 - row) * step_y
        axes = style.open_axes(style.place(figure, left, bottom, _PANEL_WIDTH, _PANEL_HEIGHT))
        axes.set_title(_name(path), fontsize=11, color=style.INK, fontweight="bold", loc="left", pad=6)
        _draw_path(axes, path)
    if not drawn:
        style.write(figure, _LEFT, height / 2, "no task has a point with performance and MUI", size=10)
    _draw_legend(figure, width)
    return figure


def _draw_path(axes: Any, path: Path) -> None:
    style.label(axes, x=_words(path.axis), y="MUI, %")
    if not path.points:
        axes.text(0.5, 0.5, "no point yet", transform=axes.transAxes, fontsize=10, color=style.INK, ha="center")
        return
    points = path.points
    x, y = (np.array([getattr(point, name) for point in points]) for name in ("performance", "mui"))
    y = 100 * y
    axes.plot(x, y, color="#8a8f98", linewidth=1, zorder=2, gid="path")
    for before, after in pairwise(range(len(points))):
        phase = points[after].phase
        if phase is not Phase.UNDECIDED:
            axes.plot(
                x[[before, after]], y[[before, after]], color=PHASE_COLORS[phase], linewidth=9, alpha=0.28,
                solid_capstyle="butt", zorder=1, gid="band",
            )  # fmt: skip
    _draw_intervals(axes, points[-1:] if len(points) > _MOST_INTERVALS else points)
    size = float(np.clip(600 / len(points), 12, 46))
    for phase in Phase:
        here = np.array([point.phase is phase for point in points])
        if here.any():
            axes.scatter(
                x[here], y[here], s=size, color=PHASE_COLORS[phase], marker=PHASE_MARKERS[phase],
                linewidth=0.6, edgecolor="white", zorder=3, gid=phase.value,
            )  # fmt: skip
    last = PHASE_COLORS[points[-1].phase]
    axes.scatter(x[-1:], y[-1:], s=150, facecolor="none", edgecolor=last, linewidth=2.2, zorder=4, gid="latest")
    places = np.column_stack([x, y])
    first = _in_view(places)
    _set_view(axes, places[first:], is_inverted=path.lower_is_better)
    if first:
        left_out = (
            f"step {points[0].step:,}" if first == 1 else f"steps {points[0].step:,} to {points[first - 1].step:,}"
        )
        axes.set_title(f"{left_out} out of view", fontsize=8.5, color=style.FAINT, loc="right", pad=6)
    _label_steps(axes, points, places, first)


def _draw_intervals(axes: Any, points: Sequence[PathPoint]) -> None:
    options = {"color": "#8a8f98", "linewidth": 0.9, "alpha": 0.6, "zorder": 1.5, "gid": "interval"}
    for point in points:
        if point.mui_interval is not None:
            low, high = point.mui_interval
            axes.plot([point.performance] * 2, [100 * low, 100 * high], **options)
        if point.performance_interval is not None:
            axes.plot(point.performance_interval, [100 * point.mui] * 2, **options)


def _in_view(places: FloatArray) -> int:
    """How many points at the beginning are left out of view: the untrained model is so far off that what comes after
    it would be a dot. Each one is, as long as the others lie in less than half of the area."""
    first = 0
    while len(places) - first > 3 and 2 * _area(places[first + 1 :]) < _area(places[first:]):
        first += 1
    return first


def _area(places: FloatArray) -> float:
    return float(np.prod(np.ptp(places, axis=0)))


def _set_view(axes: Any, places: FloatArray, *, is_inverted: bool) -> None:
    low, high = places.min(axis=0), places.max(axis=0)
    margin = np.where(high > low, 0.14 * (high - low), np.maximum(0.05 * np.abs(high), 1e-3))
    (left, bottom), (right, top) = low - margin, high + margin
    axes.set(xlim=(right, left) if is_inverted else (left, right), ylim=(max(bottom, 0.0), top))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _label_steps(axes: Any, points: Sequence[PathPoint], places: FloatArray, first: int) -> None:
    """The last step, the first in view, and some between, where there is room, each where the path is not."""
    pixels = axes.transData.transform(places)
    lines = [np.linspace(a, b, 2 + min(int(np.linalg.norm(b - a) / 3), 1000)) for a, b in pairwise(pixels)]
    path = np.concatenate([pixels, *lines])
    between = np.unique(np.linspace(first, len(points) - 1, _MOST_LABELS).round().astype(int))[1:-1]
    taken: list[FloatArray] = []
    for index in dict.fromkeys((len(points) - 1, first, *(int(i) for i in between))):
        is_last = index == len(points) - 1
        words, size = f"{points[index].step:,}", 10 if is_last else 9
        half = np.array([0.48 * size * len(words), 0.75 * size])
        boxes = [pixels[index] + way * (half + (13 if is_last else 6)) + half * [[-1], [1]] for way in _WAYS]
        costs = [_cost(box, path, taken, axes.bbox) for box in boxes]
        best = int(np.argmin(costs))
        if costs[best] >= _OVERLAP and not is_last:
            continue
        taken.append(boxes[best])
        axes.annotate(
            words,
            boxes[best].mean(axis=0),
            xycoords="figure pixels",
            fontsize=size,
            fontweight="bold" if is_last else "normal",
            color=style.INK if is_last else style.FAINT,
            ha="center",
            va="center",
            annotation_clip=False,
            gid="step",
        )


def _cost(box: FloatArray, path: FloatArray, taken: Sequence[FloatArray], panel: Any) -> float:
    """How much a box hides: of the path, of other labels, and outside of the panel; the box is ``[low/high, x/y]``."""
    hidden = ((path > box[0]) & (path < box[1])).all(axis=1).sum()
    overlaps = sum(bool((box[0] < other[1]).all() and (box[1] > other[0]).all()) for other in taken)
    is_out = (box[0] < panel.min).any() or (box[1] > panel.max).any()
    return float(hidden + _OVERLAP * (overlaps + is_out))


def _draw_legend(figure: Figure, width: float) -> None:
    handles = [
        Line2D(
            [], [], color=PHASE_COLORS[phase], marker=PHASE_MARKERS[phase], linestyle="none", markersize=7, label=words
        )
        for phase, words in _MEANING.items()
    ]
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(10 / width, 0.0),
        ncols=3 if width < 1100 else 5,
        frameon=False,
        fontsize=9.5,
        labelcolor=style.INK,
        columnspacing=1.4,
        handletextpad=0.3,
    )


def _name(path: Path) -> str:
    return "all tasks" if path.task is None else path.task


def _words(axis: str) -> str:
    name = axis.removeprefix("-")
    if name == "loss":
        return "loss, nats per token (better: →)"
    return f"{name.replace('_', ' ')} (better: →)"

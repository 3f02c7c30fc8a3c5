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
from mui_callback.pictures.panels import grid
from mui_callback.pictures.paths import Path, PathPoint
from mui_callback.pictures.point_labels import label_points
from mui_callback.pictures.scene import MOST_PANELS

_PANEL_WIDTH, _PANEL_HEIGHT = 330, 250
_LEFT, _RIGHT, _BOTTOM, _TOP, _BETWEEN = 78, 30, 104, 102, (92, 108)
_MOST_INTERVALS = 24
"""Of more points only the last one's is drawn."""
_MOST_OF_BARS = 2
"""How far error bars may widen the view to each side, in widths of the path."""
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
    n_left_out = len(paths) - len(drawn)
    if n_left_out:
        subtitle += f"; {n_left_out} more {'task is' if n_left_out == 1 else 'tasks are'} not shown"
    n_columns, n_rows = grid(len(drawn))
    step_x, step_y = _PANEL_WIDTH + _BETWEEN[0], _PANEL_HEIGHT + _BETWEEN[1]
    width = max(_LEFT + n_columns * step_x - _BETWEEN[0] + _RIGHT, 720)
    height = _BOTTOM + n_rows * step_y - _BETWEEN[1] + _TOP
    figure = style.blank(width, height, title, subtitle)
    for place, path in enumerate(drawn):
        row, column = divmod(place, n_columns)
        left, bottom = _LEFT + column * step_x, _BOTTOM + (n_rows - 1 - row) * step_y
        axes = style.open_axes(style.place(figure, left, bottom, _PANEL_WIDTH, _PANEL_HEIGHT))
        name = style.shortened(_name(path), _PANEL_WIDTH, 11, "bold")
        style.write(figure, left, bottom + _PANEL_HEIGHT + 24, name, size=11, weight="bold", gid="name")
        note = _draw_path(axes, path)
        style.write(figure, left, bottom + _PANEL_HEIGHT + 8, note, size=8.5, color=style.FAINT, gid="note")
    if not drawn:
        style.write(figure, _LEFT, height / 2, "no task has a point with performance and MUI", size=10)
    _draw_legend(figure)
    return figure


def _draw_path(axes: Any, path: Path) -> str:
    """Draw it, and say what is to be seen of it."""
    style.label(axes, x=words_of_axis(path.axis), y="MUI, %")
    if not path.points:
        axes.text(0.5, 0.5, "no point yet", transform=axes.transAxes, fontsize=10, color=style.INK, ha="center")
        return ""
    points = path.points
    places = np.array([(point.performance, 100 * point.mui) for point in points])
    x, y = places.T
    axes.plot(x, y, color="#8a8f98", linewidth=1, zorder=2, gid="path")
    for before, after in pairwise(range(len(points))):
        phase = points[after].phase
        if phase is not Phase.UNDECIDED:
            axes.plot(
                x[[before, after]], y[[before, after]], color=PHASE_COLORS[phase], linewidth=9, alpha=0.28,
                solid_capstyle="butt", zorder=1, gid="band",
            )  # fmt: skip
    first = _in_view(places)
    bars = _bars(points[-1:] if len(points) > _MOST_INTERVALS else points[first:])
    for (start, end), cap in bars:
        axes.plot(
            *zip(start, end, strict=True), color="#8a8f98", linewidth=0.9, alpha=0.6, marker=cap, markersize=5,
            markeredgewidth=0.9, zorder=1.5, gid="interval",
        )  # fmt: skip
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
    names, ends = [str(point) for point in points], [bar for bar, _ in bars]
    _set_view(axes, places[first:], ends, is_inverted=path.lower_is_better)
    label_points(axes, names, places, ends, first)
    seen, unseen = (_range(some, path.counted) for some in (names[first:], names[:first]))
    return f"{seen}; {unseen} out of view" if first else seen


def _range(names: Sequence[str], counted: tuple[str, str]) -> str:
    if not names:
        return ""
    return f"{counted[0]} {names[0]}" if len(names) == 1 else f"{counted[1]} {names[0]} to {names[-1]}"


def _bars(points: Sequence[PathPoint]) -> list[tuple[FloatArray, str]]:
    """The ends of each error bar, ``[2, 2]``, and the mark that is its cap."""
    bars = []
    for point in points:
        if point.mui_interval is not None:
            bars.append((np.array([(point.performance, 100 * end) for end in point.mui_interval]), "_"))
        if point.performance_interval is not None:
            bars.append((np.array([(end, 100 * point.mui) for end in point.performance_interval]), "|"))
    return bars


def _in_view(places: FloatArray) -> int:
    """How many points at the beginning are left out of view: the untrained model is so far off that what comes after
    it would be a dot. Each one is, as long as the others lie in less than half of the area, but most of them stay."""
    first, most = 0, len(places) // 4 if len(places) > 5 else 0
    while first < most and 2 * _area(places[first + 1 :]) < _area(places[first:]):
        first += 1
    return first


def _area(places: FloatArray) -> float:
    return float(np.prod(np.ptp(places, axis=0)))


def _set_view(axes: Any, places: FloatArray, bars: Sequence[FloatArray], *, is_inverted: bool) -> None:
    """Points and error bars are in view; bars that would make a dot of the path, in part."""
    low, high = places.min(axis=0), places.max(axis=0)
    most = np.where(high > low, _MOST_OF_BARS * (high - low), np.inf)
    with_bars = np.concatenate([places, *bars])
    low, high = np.maximum(with_bars.min(axis=0), low - most), np.minimum(with_bars.max(axis=0), high + most)
    # Never so narrow that a number along the axis has five digits.
    margin = np.maximum(0.14 * (high - low), np.where(high > 0, 0.02 * high, 1e-3))
    (left, bottom), (right, top) = low - margin, high + margin
    axes.set(xlim=(right, left) if is_inverted else (left, right), ylim=(max(bottom, 0.0), top))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _draw_legend(figure: Figure) -> None:
    """The phases in columns of one width, in one line where there is room."""
    page = figure.get_size_inches() * style.DPI
    column = 32 + max(style.text_width(words, 9.5) for words in _MEANING.values())
    n_columns = min(len(_MEANING), int((page[0] - 14) // column))
    for place, (phase, words) in enumerate(_MEANING.items()):
        row, number = divmod(place, n_columns)
        x, y = 28 + number * column, 22 * ((len(_MEANING) - 1) // n_columns - row) + 20
        mark = Line2D([x / page[0]], [y / page[1]], markersize=7, linestyle="none", transform=figure.transFigure)
        mark.set(color=PHASE_COLORS[phase], marker=PHASE_MARKERS[phase])
        figure.add_artist(mark)
        style.write(figure, x + 13, y, words, size=9.5, va="center_baseline", gid="legend")


def _name(path: Path) -> str:
    return "all tasks" if path.task is None else path.task


def words_of_axis(axis: str) -> str:
    """What performance is, and where it is better."""
    name = axis.removeprefix("-")
    if name == "loss":
        return "loss, nats per token (better: →)"
    return f"{name.replace('_', ' ')} (better: →)"

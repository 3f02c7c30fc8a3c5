"""Pages of small panels that are alike, with the meaning of their colours below them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mui_callback.metrics.utilization import FloatArray
from mui_callback.pictures import style
from mui_callback.pictures.palette import colors_of

_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_MARKERS = ("o", "s", "^", "D")
_LEFT, _RIGHT, _TOP, _BOTTOM, _BETWEEN = 78, 30, 92, 66, (86, 92)
_WIDTHS = {1: 660, 2: 440, 3: 330}
"""Of a panel, by the number of columns."""
_LEGEND_ROW, _MOST_NAMED, _NAME = 21, 18, 230


@dataclass(frozen=True)
class Stroke:
    """How what has one name is drawn in every panel."""

    color: str
    dashes: Any
    marker: str


def strokes(names: Sequence[str]) -> dict[str, Stroke]:
    """Colours in order, and other dashes and marks where they begin again."""
    distinct = list(dict.fromkeys(names))
    colors = colors_of(distinct)
    n_colors = max(len(set(colors.values())), 1)
    rounds = {name: index // n_colors % len(_DASHES) for index, name in enumerate(distinct)}
    return {name: Stroke(colors[name], _DASHES[again], _MARKERS[again]) for name, again in rounds.items()}


def grid(n_panels: int) -> tuple[int, int]:
    """Columns and rows of a page."""
    n_columns = {0: 1, 1: 1, 2: 2, 4: 2}.get(n_panels, 3)
    return n_columns, max(1, -(-n_panels // n_columns))


def panelled(
    titles: Sequence[str],
    *,
    title: str,
    subtitle: str,
    legend: Mapping[str, Stroke],
    height: int = 230,
    left: int = _LEFT,
) -> tuple[Figure, list[Any]]:
    """A page and the axes of its panels.

    Args:
        titles: of the panels, at most `scene.MOST_PANELS`.
        title: above the page.
        subtitle: below that.
        legend: what is named below the panels.
        height: of a panel, in pixels.
        left: room left of a panel.
    """
    n_columns, n_rows = grid(len(titles))
    width, between = _WIDTHS[n_columns], (left + 8, _BETWEEN[1])
    page_width = left + n_columns * (width + between[0]) - between[0] + _RIGHT
    rows, column = _legend_shape(legend, page_width)
    bottom = _BOTTOM + rows * _LEGEND_ROW
    figure = style.blank(
        page_width, bottom + n_rows * (height + between[1]) - between[1] + _TOP,
        style.shortened(title, page_width - 32, 13, "bold"), style.shortened(subtitle, page_width - 32, 9.5),
    )  # fmt: skip
    panels = []
    for place, name in enumerate(titles):
        row, number = divmod(place, n_columns)
        x, y = left + number * (width + between[0]), bottom + (n_rows - 1 - row) * (height + between[1])
        panels.append(style.open_axes(style.place(figure, x, y, width, height)))
        style.write(figure, x, y + height + 8, style.shortened(name, width, 11, "bold"), size=11, weight="bold")
    _draw_legend(figure, legend, rows, column)
    return figure, panels


def draw_gap(axes: Any) -> None:
    """Say that there is nothing in a panel."""
    axes.text(0.5, 0.5, "no value", transform=axes.transAxes, fontsize=10, color=style.FAINT, ha="center", va="center")


def spread(values: FloatArray) -> tuple[float, float]:
    """Limits of an axis, so that no number along it has five digits."""
    known = values[np.isfinite(values)]
    if not len(known):
        return 0.0, 1.0
    low, high = float(known.min()), float(known.max())
    margin = max(0.08 * (high - low), 0.02 * abs(high), 1e-3 if high == low == 0 else 0.0)
    return low - margin, high + margin


def _legend_shape(legend: Mapping[str, Stroke], page_width: int) -> tuple[int, int]:
    """Rows, and the pixels of a column."""
    if not legend:
        return 0, 1
    named = [style.shortened(name, _NAME, 9.5) for name in list(legend)[:_MOST_NAMED]]
    column = 56 + int(max(style.text_width(name, 9.5) for name in named))
    n_columns = max(1, (page_width - 40) // column)
    return -(-(len(named) + (len(legend) > _MOST_NAMED)) // n_columns), column


def _draw_legend(figure: Figure, legend: Mapping[str, Stroke], rows: int, column: int) -> None:
    if not rows:
        return
    page = figure.get_size_inches() * style.DPI
    n_columns = max(1, int(page[0] - 40) // column)
    for place, (name, stroke) in enumerate(list(legend.items())[:_MOST_NAMED]):
        row, number = divmod(place, n_columns)
        x, y = 20 + number * column, 16 + (rows - 1 - row) * _LEGEND_ROW
        line = Line2D(
            np.array([x, x + 12, x + 24]) / page[0], np.array([y, y, y]) / page[1], transform=figure.transFigure
        )
        line.set(color=stroke.color, linestyle=stroke.dashes, linewidth=2, marker=stroke.marker, markersize=6)
        line.set_markevery([1])
        figure.add_artist(line)
        style.write(figure, x + 30, y, style.shortened(name, _NAME, 9.5), size=9.5, va="center_baseline", gid="legend")
    if len(legend) > _MOST_NAMED:
        row, number = divmod(_MOST_NAMED, n_columns)
        words = f"and {len(legend) - _MOST_NAMED} more"
        x, y = 20 + number * column, 16 + (rows - 1 - row) * _LEGEND_ROW
        style.write(figure, x, y, words, size=9.5, va="center_baseline", color=style.FAINT)

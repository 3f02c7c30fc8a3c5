"""Values over training: a panel for each task or metric, a line for each model or task, a band for its interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mui_callback.metrics.utilization import FloatArray
from mui_callback.pictures import style
from mui_callback.pictures.panels import Stroke, draw_gap, panelled, spread, strokes

_DOT_ROW, _MOST_LEFT = 24, 220


@dataclass(frozen=True)
class Line:
    """The values of one name; NaN where there is none."""

    name: str
    x: FloatArray
    y: FloatArray
    low: FloatArray | None = None
    """Lower ends of intervals."""
    high: FloatArray | None = None


@dataclass(frozen=True)
class Panel:
    """What is drawn in one pair of axes."""

    title: str
    unit: str
    """Along the values."""
    lines: Sequence[Line]


def curves(
    panels: Sequence[Panel], *, title: str, subtitle: str, x_label: str, x_words: Callable[[float], str]
) -> Figure:
    """Lines over training, with the band of each interval.

    Args:
        panels: at most as many as fit on a page.
        title: above it.
        subtitle: below that.
        x_label: what training is counted in.
        x_words: a number of it as it is written along the axis.
    """
    lines = [line for panel in panels for line in panel.lines]
    styles = strokes([line.name for line in lines])
    known = {line.name for line in lines if np.isfinite(line.y).any()}
    # A single line is what the title says.
    legend = {name: stroke for name, stroke in styles.items() if name in known} if len(styles) > 1 else {}
    figure, places = panelled([panel.title for panel in panels], title=title, subtitle=subtitle, legend=legend)
    for axes, panel in zip(places, panels, strict=True):
        style.label(axes, x=x_label, y=panel.unit)
        for line in panel.lines:
            _draw_line(axes, line, styles[line.name])
        if not any(np.isfinite(line.y).any() for line in panel.lines):
            draw_gap(axes)
        axes.set(xlim=_limits(panel), ylim=spread(_all_values(panel)))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(lambda value, _: x_words(value))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=_are_counts(panel)))
    return figure


def dots(panels: Sequence[Panel], *, title: str, subtitle: str) -> Figure:
    """The last value of each name in a row of its own, with its interval: for models that have a single checkpoint.

    Args:
        panels: at most as many as fit on a page; all have the same names.
        title: above it.
        subtitle: below that.
    """
    names = list(dict.fromkeys(line.name for panel in panels for line in panel.lines))
    styles = strokes(names)
    widest = max((style.text_width(name, 9.5) for name in names), default=0.0)
    left = int(np.clip(widest + 24, 78, _MOST_LEFT))
    shown = [style.shortened(name, left - 24, 9.5) for name in names]
    height = max(3, len(names)) * _DOT_ROW
    titles = [panel.title for panel in panels]
    figure, places = panelled(titles, title=title, subtitle=subtitle, legend={}, height=height, left=left)
    for axes, panel in zip(places, panels, strict=True):
        style.label(axes, x=panel.unit)
        for line in panel.lines:
            row, known = names.index(line.name), np.flatnonzero(np.isfinite(line.y))
            if len(known):
                _draw_dot(axes, line, int(known[-1]), row, styles[line.name])
        axes.set(xlim=spread(_all_values(panel)), ylim=(max(3, len(names)) - 0.5, -0.5))
        axes.set_yticks(range(len(names)), shown)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    return figure


def _draw_line(axes: Any, line: Line, stroke: Stroke) -> None:
    axes.plot(
        line.x, line.y, color=stroke.color, linestyle=stroke.dashes, linewidth=1.8, marker=stroke.marker, markersize=4,
        markeredgecolor="white", markeredgewidth=0.6, gid="line",
    )  # fmt: skip
    if line.low is None or line.high is None:
        return
    if np.isfinite(line.y).sum() > 1:
        axes.fill_between(line.x, line.low, line.high, color=stroke.color, alpha=0.16, linewidth=0, gid="interval")
    else:
        axes.vlines(line.x, line.low, line.high, color=stroke.color, linewidth=1.2, gid="interval")


def _draw_dot(axes: Any, line: Line, index: int, row: int, stroke: Stroke) -> None:
    if line.low is not None and line.high is not None:
        axes.hlines(row, line.low[index], line.high[index], color=stroke.color, linewidth=1.6, gid="interval")
    axes.plot(
        line.y[index],
        row,
        "o",
        color=stroke.color,
        markersize=7,
        markeredgecolor="white",
        markeredgewidth=0.6,
        gid="line",
    )


def _limits(panel: Panel) -> tuple[float, float]:
    low, high = spread(np.concatenate([np.zeros(0), *(line.x for line in panel.lines)]))
    return (low, high) if high - low > 1e-9 * max(abs(high), 1) else (low - 1, high + 1)


def _are_counts(panel: Panel) -> bool:
    values = _all_values(panel)
    known = values[np.isfinite(values)]
    return len(known) > 0 and bool((known == known.round()).all() and np.ptp(known) >= 1)


def _all_values(panel: Panel) -> FloatArray:
    ends = [end for line in panel.lines for end in (line.y, line.low, line.high) if end is not None]
    return np.concatenate([np.zeros(0), *ends])

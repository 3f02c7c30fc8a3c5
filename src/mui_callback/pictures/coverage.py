"""Coverage curves: MUI by the number of samples, with their bands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from mui_callback.metrics.rarefaction import CoverageCurve
from mui_callback.metrics.utilization import FloatArray
from mui_callback.pictures import style
from mui_callback.pictures.palette import colors_of

_LABEL_PLACES = [
    *((8, dy, "left") for dy in (0, 14, -14)),
    *((dx, dy, ha) for dy in (14, -14) for dx, ha in ((0, "center"), (-8, "right"))),
    *((8, dy, "left") for dy in (28, -28, -42, -56, -70, -84)),
]
"""Where the label of a line's end may stand: offset in points and alignment, the best first."""


def coverage_curves(
    curves: Mapping[str, CoverageCurve], *, level: float, title: str = "", at: int | None = None
) -> Figure:
    """A picture of MUI by the number of samples, each curve named at its end.

    Args:
        curves: of each data set, up to all of its samples.
        level: of the intervals.
        title: line above the picture.
        at: a number of samples to mark.
    """
    figure = Figure(figsize=(10, 6.2), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    colors = colors_of(curves)
    for name, curve in sorted(curves.items(), key=lambda item: -item[1].n_samples):  # short lines above long ones
        axes.plot(curve.sizes, 100 * curve.mui, color=colors[name], linewidth=2)
        axes.plot(curve.sizes[-1], 100 * curve.mui[-1], "o", color=colors[name], markersize=5)
        if curve.low is not None and curve.high is not None:
            axes.fill_between(
                curve.sizes, 100 * curve.low, 100 * curve.high, color=colors[name], alpha=0.16, linewidth=0
            )
    widest = max(style.text_width(name, 10, "bold") / style.DPI for name in curves)
    room = max(1 - 1 / 1.14, (widest + 0.2) / (figure.get_figwidth() - 0.9))
    axes.set_xlim(0, max(curve.n_samples for curve in curves.values()) / (1 - room))
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("samples", color=style.INK)
    axes.set_ylabel("MUI: key neurons, % of the neurons of all experts", color=style.INK)
    axes.tick_params(colors=style.INK)
    axes.spines[:].set_color(style.INK)
    figure.suptitle(title, fontsize=11, parse_math=False, color=style.INK)
    words = f"MUI by the number of samples, with {100 * level:g} % intervals"
    axes.set_title(words, fontsize=14, color=style.INK)
    style.open_axes(axes)
    if at is not None:
        _mark(axes, at)
    canvas.draw()
    figure.set_layout_engine("none")  # labels are placed among the lines as they are now
    _label_ends(axes, curves, colors)
    return figure


def _mark(axes: Any, at: int) -> None:
    right = axes.get_xlim()[1]
    axes.axvline(at, color=style.FAINT, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
    is_left = at < 0.7 * right
    axes.annotate(
        f"compared at {at:,}",
        (at, 0),
        xycoords=("data", "axes fraction"),
        xytext=(5 if is_left else -5, 6),
        textcoords="offset points",
        ha="left" if is_left else "right",
        color=style.FAINT,
    )


def _label_ends(axes: Any, curves: Mapping[str, CoverageCurve], colors: Mapping[str, str]) -> None:
    """Write each name at the end of its line, where it is the least in the way of lines and other names."""
    points = np.concatenate([_pixels(axes, curve) for curve in curves.values()])
    taken = [(text.get_window_extent(), 0) for text in axes.texts]
    for name, curve in sorted(curves.items(), key=lambda item: -item[1].mui[-1]):
        label = axes.annotate(
            name,
            (curve.n_samples, 100 * curve.mui[-1]),
            xytext=(0, 0),
            textcoords="offset points",
            va="center",
            color=colors[name],
            fontweight="bold",
            parse_math=False,
        )
        costs = []
        for place in _LABEL_PLACES:
            box = _put(label, place).padded(2)
            hidden = ((points > box.min) & (points < box.max)).all(axis=1).sum()
            overlaps = sum(bool(box.overlaps(other)) for other, _ in taken)
            # Names of lines that end together are in the order of the lines.
            misplaced = sum(n == curve.n_samples and box.y0 > other.y0 for other, n in taken)
            is_out = (box.min < axes.bbox.min).any() or (box.max > axes.bbox.max + 8).any()
            costs.append(hidden + 1000 * overlaps + 500 * misplaced + 300 * is_out)
        taken.append((_put(label, _LABEL_PLACES[int(np.argmin(costs))]), curve.n_samples))


def _pixels(axes: Any, curve: CoverageCurve) -> FloatArray:
    """Points along a line, close to each other, ``[points, 2]``."""
    x = np.linspace(1, curve.n_samples, 500)
    pixels: FloatArray = axes.transData.transform(np.column_stack([x, 100 * np.interp(x, curve.sizes, curve.mui)]))
    return pixels


def _put(label: Any, place: tuple[float, float, str]) -> Any:
    """Move a label and return its box in pixels."""
    dx, dy, ha = place
    label.set(position=(dx, dy), ha=ha)
    return label.get_window_extent()

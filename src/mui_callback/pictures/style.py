"""How a picture looks, told to each of its parts: matplotlib's global settings are the user's, to neither read nor set.

Everything is placed in pixels, since a cell of a heatmap that is no whole number of pixels wide is wider than the next.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray
from PIL import Image

DPI = 100
INK, FAINT, RULE = "#1f2329", "#5c6370", "#c9ced6"
"""Colours of words, of words that matter less, and of lines."""
_FONT = ["DejaVu Sans"]
"""It comes with matplotlib."""
_COLORS_KEPT = 256


def blank(width: int, height: int, title: str, subtitle: str) -> Figure:
    """A white page with a title; its size is in pixels, to be known before anything is placed."""
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white", edgecolor="white")
    figure.set_layout_engine("none")
    write(figure, 16, height - 14, title, size=13, weight="bold", va="top")
    write(figure, 16, height - 38, subtitle, size=9.5, color=FAINT, va="top")
    return figure


def write(figure: Figure, x: float, y: float, words: str, *, size: float, **options: Any) -> Text:
    """Words on the page, at pixels from its lower left corner."""
    width, height = figure.get_size_inches() * DPI
    return figure.text(x / width, y / height, words, fontsize=size, **{"color": INK, **options})


def place(figure: Figure, left: float, bottom: float, width: float, height: float) -> Any:
    """Axes on the page, in pixels from its lower left corner."""
    page = figure.get_size_inches() * DPI
    axes = figure.add_axes((left / page[0], bottom / page[1], width / page[0], height / page[1]), facecolor="white")
    axes.set_axisbelow(True)
    axes.minorticks_off()
    axes.grid(False)
    axes.margins(x=0.05, y=0.05)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(
        colors=RULE, labelcolor=INK, labelsize=9.5, width=0.8, length=3, pad=4, direction="out", top=False, right=False
    )
    axes.spines[:].set(color=RULE, linewidth=0.8, visible=True)
    return axes


def open_axes(axes: Any) -> Any:
    """Axes for curves, in any figure: with a faint grid, and open at the top and on the right."""
    axes.grid(color="#b0b0b0", linestyle="-", linewidth=0.8, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def label(axes: Any, x: str = "", y: str = "") -> None:
    """Words along the axes."""
    axes.set_xlabel(x, fontsize=10, color=INK, labelpad=4)
    axes.set_ylabel(y, fontsize=10, color=INK, labelpad=4)


def rendered(figure: Figure) -> NDArray[np.uint8]:
    """The page as pixels, uint8 ``[height, width, 3]``."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_ticklabels()  # made now, they are drawn as they are
    for text in figure.findobj(Text):
        text.set(usetex=False, parse_math=False, fontfamily=_FONT, fontstyle="normal")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels: NDArray[np.uint8] = np.asarray(canvas.buffer_rgba())[..., :3]
    return pixels


def as_png(figure: Figure) -> bytes:
    """The page as a file, of so few colours that it is a third of the size."""
    image = Image.fromarray(rendered(figure)).quantize(
        _COLORS_KEPT, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
    )
    buffer = BytesIO()
    image.save(buffer, format="png", optimize=True)
    return buffer.getvalue()

"""How a picture looks, told to each of its parts: matplotlib's global settings are the user's, to neither read nor set.

Everything is placed in pixels, since a cell of a heatmap that is no whole number of pixels wide is wider than the next.
"""

from __future__ import annotations

from bisect import bisect_right
from io import BytesIO, StringIO
from math import ceil
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.text import Text
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial import cKDTree

DPI = 100
INK, FAINT, RULE = "#1f2329", "#5c6370", "#c9ced6"
"""Colours of words, of words that matter less, and of lines."""
_FONT = ["DejaVu Sans"]
"""It comes with matplotlib."""
_TITLE: dict[str, Any] = {"size": 13, "weight": "bold"}
_SUBTITLE: dict[str, Any] = {"size": 9.5}
_EDGE = 16
_COLORS_KEPT = 256


def blank(width: int, height: int, title: str, subtitle: str) -> Figure:
    """A white page with a title; its size is in pixels, to be known before anything is placed. It is made wider where
    its words need it."""
    width = max(width, 2 * _EDGE + ceil(max(text_width(title, **_TITLE), text_width(subtitle, **_SUBTITLE))))
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white", edgecolor="white")
    figure.set_layout_engine("none")
    write(figure, _EDGE, height - 14, title, va="top", **_TITLE)
    write(figure, _EDGE, height - 38, subtitle, va="top", color=FAINT, **_SUBTITLE)
    return figure


def text_width(words: str, size: float, weight: str = "normal") -> float:
    """The pixels that words take."""
    font = FontProperties(family=_FONT, style="normal", weight=weight, size=size)
    return float(RendererAgg(1, 1, DPI).get_text_width_height_descent(words, font, False)[0])


def shortened(words: str, width: float, size: float, weight: str = "normal") -> str:
    """Words, with … for their middle where they take more than so many pixels."""

    def cut(n: int) -> str:
        return f"{words[: n - n // 2].rstrip()}…{words[len(words) - n // 2 :].lstrip()}"

    if text_width(words, size, weight) <= width:
        return words
    n_fit = bisect_right(range(len(words)), width, key=lambda n: text_width(cut(n), size, weight))
    return cut(max(n_fit - 1, 0))


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
    _settle(figure)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels: NDArray[np.uint8] = np.asarray(canvas.buffer_rgba())[..., :3]
    return pixels


def _settle(figure: Figure) -> None:
    """Tell all words how they look."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_ticklabels()  # made now, they are drawn as they are
    for text in figure.findobj(Text):
        text.set(usetex=False, parse_math=False, fontfamily=_FONT, fontstyle="normal")


def as_svg(figure: Figure) -> str:
    """The page as SVG; its words stay words, which can be searched and read out, in whatever font there is."""
    _settle(figure)
    buffer = StringIO()
    # It takes these from nowhere else; all of them are as before afterwards.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mui", "svg.image_inline": True}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    return buffer.getvalue().replace(f"'{_FONT[0]}'", f"'{_FONT[0]}', system-ui, sans-serif")


def as_png(figure: Figure) -> bytes:
    """The page as a file, of so few colours that it is a third of the size.

    The most frequent ones are kept as they are, so that a colour means the same in every picture; each of the others,
    as of edges of letters, becomes the nearest of these and of some that are far apart.
    """
    pixels = rendered(figure)
    codes = pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.uint32)
    found, place, count = np.unique(codes, return_inverse=True, return_counts=True)
    colors = np.column_stack([found >> 16, found >> 8 & 255, found & 255])
    half = _COLORS_KEPT // 2
    apart = Image.fromarray(pixels).quantize(half, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    kept = np.concatenate([colors[np.argsort(-count, kind="stable")[:half]], np.reshape(apart.getpalette(), (-1, 3))])
    nearest = cKDTree(kept).query(colors)[1].astype(np.uint8)
    image = Image.fromarray(nearest[place].reshape(codes.shape))
    image.putpalette(kept.astype(np.uint8).tobytes())
    buffer = BytesIO()
    image.save(buffer, format="png", optimize=True)
    return buffer.getvalue()

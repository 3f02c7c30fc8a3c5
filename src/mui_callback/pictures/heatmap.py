"""A cell for each expert of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from mui_callback.metrics.utilization import FloatArray
from mui_callback.pictures import style
from mui_callback.pictures.expert_blocks import ExpertBlock, expert_blocks
from mui_callback.task_report import TaskReport

_ZERO, _ABSENT = "#dfe2e7", "white"
"""A zero must not look like a small value, nor an expert that there is not like a zero."""
_ZERO_ON_ANY = (128, 139, 159, 64)
"""It looks the same on white, and is dark on dark."""
_MAP = "viridis"
_TINY = 1e-9
"""Below it the colour is that of zero; a share of neurons or samples is never so small."""
_NORM = PowerNorm(1 / 3, _TINY, 100)
"""The same for every probe and both values, so that colours can be compared; most experts are far below the highest,
and the cube root tells 1, 5 and 50 % apart."""
_TICKS = (1, 5, 20, 50, 100)
_LEFT, _RIGHT, _BOTTOM, _TOP, _GAP = 64, 78, 34, 86, 30
_LEAST_WIDTH, _LEAST_HEIGHT = 640, 152
_LABEL_HEIGHT, _LABEL_WIDTH = 17, 42
_NUMBERED = (40, 22)
"""Cells of at least this size have their value written into them."""


@dataclass(frozen=True)
class _Cells:
    """The size of a cell in pixels."""

    height: int
    width_of: dict[str, int]


def expert_heatmap(
    task: TaskReport, values: FloatArray, *, title: str, subtitle: str, is_numbered: bool = True
) -> Figure:
    """A picture of one value of every expert: a row for each layer; routed experts, beside them shared ones and,
    where dense layers are probed too, theirs. Zero, values and experts that a layer does not have differ in colour.

    Args:
        task: whose experts these are. Where nothing was measured, the picture says so.
        values: of each expert, in [0, 1], float64 ``[E]``; drawn in percent.
        title: above it.
        subtitle: below that.
        is_numbered: whether values are written into cells that are large enough.
    """
    blocks = expert_blocks(task.layout, 100 * values)
    cells = _cell_size(blocks, len(task.layout.layers))
    widths = [len(block.labels) * cells.width_of[block.kind] for block in blocks]
    height = len(task.layout.layers) * cells.height
    room = max(height, _LEAST_HEIGHT)
    page_width = max(_LEFT + sum(widths) + _GAP * len(blocks) + _RIGHT, _LEAST_WIDTH)
    figure = style.blank(page_width, room + _BOTTOM + _TOP, title, subtitle)
    colors = matplotlib.colormaps[_MAP].with_extremes(under=_ZERO, bad=_ABSENT)
    left = _LEFT
    for block, width in zip(blocks, widths, strict=True):
        axes = style.place(figure, left, _BOTTOM + room - height, width, height)
        _draw_block(axes, block, cells, colors, is_measured=task.is_measured, is_numbered=is_numbered)
        _label_rows(axes, [str(layer.layer) for layer in task.layout.layers], cells.height, is_first=left == _LEFT)
        left += width + _GAP
    _draw_key(figure, left, room, colors, has_absent=any(np.isnan(b.values).any() for b in blocks))
    return figure


def cell_colors(values: FloatArray) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The colour of each cell as the heatmap has it, but for zero and absent experts, which show what is behind.

    Args:
        values: of a block, in percent, NaN for an expert that there is not.

    Returns:
        The number of its colour for each cell, uint8, and these colours, uint8 ``[256, 4]``.
    """
    n_colors = 254
    palette = np.zeros((256, 4), dtype=np.uint8)
    palette[1] = _ZERO_ON_ANY
    palette[2:] = np.round(255 * matplotlib.colormaps[_MAP](np.linspace(0, 1, n_colors)))
    place = np.asarray(_NORM(np.clip(values, _TINY, 100)), dtype=np.float64)
    numbers = 2 + np.round((n_colors - 1) * np.nan_to_num(place))
    return np.select([np.isnan(values), values < _TINY], [0, 1], numbers).astype(np.uint8), palette


def _cell_size(blocks: list[ExpertBlock], n_layers: int) -> _Cells:
    n_routed = max((len(block.labels) for block in blocks if block.kind == "routed"), default=1)
    routed = int(np.clip(1060 // n_routed, 2, 56))
    apart = max(routed, 24)  # few columns, which must be seen
    return _Cells(int(np.clip(600 // n_layers, 6, 40)), {"routed": routed, "shared": apart, "dense": apart})


def _draw_block(
    axes: Any, block: ExpertBlock, cells: _Cells, colors: Colormap, *, is_measured: bool, is_numbered: bool
) -> None:
    values = block.values if is_measured else np.full_like(block.values, np.nan)
    axes.imshow(values, cmap=colors, norm=_NORM, aspect="auto", interpolation="none", origin="upper", resample=False)
    axes.set_gid(block.kind)
    width = cells.width_of[block.kind]
    label_width = _LABEL_WIDTH if block.kind == "routed" else 26
    ticks = _every(len(block.labels), width, label_width)
    names = [block.labels[tick] for tick in ticks] if block.kind != "dense" else [""] * len(ticks)
    axes.set_xticks(ticks, names)
    words = {"routed": "routed experts", "shared": "shared", "dense": "dense"}[block.kind]
    axes.text(
        0.5, 1, words, transform=axes.transAxes, fontsize=10, color=style.INK, ha="center", va="bottom"
    ).set_position((0.5, 1 + 5 / (len(values) * cells.height)))
    if not is_measured:
        if block.kind == "routed":
            axes.text(0.5, 0.5, "nothing was measured", transform=axes.transAxes, fontsize=10, ha="center", va="center")
    elif is_numbered and width >= _NUMBERED[0] and cells.height >= _NUMBERED[1]:
        _write_values(axes, block.values)


def _write_values(axes: Any, values: FloatArray) -> None:
    for row, column in np.argwhere(~np.isnan(values)):
        value = values[row, column]
        is_dark = value > 0 and _NORM(value) < 0.6
        axes.text(
            column, row, f"{value:.3g}", fontsize=8.5, ha="center", va="center", color="white" if is_dark else style.INK
        )


def _label_rows(axes: Any, layers: list[str], height: int, *, is_first: bool) -> None:
    ticks = _every(len(layers), height, _LABEL_HEIGHT)
    axes.set_yticks(ticks, [layers[tick] for tick in ticks] if is_first else [""] * len(ticks))
    if is_first:
        style.label(axes, y="layer")


def _every(n: int, size: int, label_size: int) -> list[int]:
    """Places of labels: as many cells apart as a label needs, in powers of two, as experts come."""
    apart = 2 ** max(0, int(np.ceil(np.log2(label_size / size))))
    return list(range(0, n, apart))


def _draw_key(figure: Figure, left: int, height: int, colors: Colormap, *, has_absent: bool) -> None:
    """The bar of colours and, below it, those that are not in it."""
    others = [(_ZERO, "0"), (_ABSENT, "none")][: 1 + has_absent]
    bar_height = min(height - 22 * len(others), 420)
    bottom = _BOTTOM + height - bar_height
    axes = style.place(figure, left, bottom, 14, bar_height)
    bar = figure.colorbar(ScalarMappable(_NORM, colors), cax=axes)
    bar.outline.set(edgecolor=style.RULE, linewidth=0.8)
    bar.set_ticks(_TICKS, labels=[f"{tick} %" for tick in _TICKS])
    axes.tick_params(
        colors=style.RULE, labelcolor=style.INK, labelsize=9.5, width=0.8, length=3, pad=4, direction="out", left=False
    )
    axes.minorticks_off()
    width, page = figure.get_size_inches() * style.DPI
    for number, (color, words) in enumerate(others, start=1):
        y = bottom - 22 * number
        figure.add_artist(
            Rectangle(
                (left / width, y / page), 14 / width, 13 / page, facecolor=color, edgecolor=style.RULE, linewidth=0.8
            )
        )
        style.write(figure, left + 20, y + 6, words, size=9.5, va="center")

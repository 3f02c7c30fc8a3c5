"""Where points are named, so that a name hides nothing and is taken for that of no other point."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from mui_callback.metrics.utilization import FloatArray
from mui_callback.pictures import style

_MOST = 6
_WAYS = np.array([(1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.8), (0.8, -0.8), (-0.8, 0.8), (-0.8, -0.8)])
"""Where it may be, seen from its point; the best first."""
_GAPS = (6, 10, 15)
"""Pixels between a point and its step."""
_RING = 7
"""Pixels by which the mark of the last point is larger."""
_APART = 3
"""Pixels between what is drawn and the next that counts as hidden."""
_BEYOND = (24, 0)
"""Pixels right of and above the panel in which it may be."""
_NEVER = 1000


def label_points(axes: Any, names: Sequence[str], places: FloatArray, bars: Sequence[FloatArray], first: int) -> None:
    """Write the name of the last point, of the first in view, and of some between, where there is room.

    Args:
        axes: whose limits are set.
        names: of each point.
        places: of each point, in the coordinates of the axes, ``[P, 2]``.
        bars: the ends of each error bar that is drawn, ``[2, 2]``.
        first: the first point that is in view.
    """
    pixels = axes.transData.transform(places)
    path = [_line(a, b) for a, b in pairwise(pixels)]
    drawn = np.concatenate([pixels, *path, *(_line(*axes.transData.transform(bar)) for bar in bars)])
    last = len(names) - 1
    between = np.unique(np.linspace(first, last, _MOST).round().astype(int))[1:-1]
    taken: list[FloatArray] = []
    for index in dict.fromkeys((last, first, *(int(i) for i in between))):
        if index != last and np.linalg.norm(pixels[index] - pixels[last]) < 2 * _RING:
            continue  # its mark is behind the ring
        words, size, weight = names[index], *((10, "bold") if index == last else (9, "normal"))
        half = np.array([style.text_width(words, size, weight) / 2 + 2, 0.75 * size])
        boxes = [
            pixels[index] + way * (half + gap + _RING * (index == last)) + half * [[-1], [1]]
            for gap in _GAPS
            for way in _WAYS
        ]
        # What is inside the ring cannot be told apart.
        others = pixels[np.linalg.norm(pixels - pixels[index], axis=1) > (_RING if index == last else 1)]
        costs = [_cost(box, pixels[index], others, drawn, taken, axes.bbox) for box in boxes]
        best = int(np.argmin(costs))
        if costs[best] >= (_NEVER if index in (first, last) else 1):
            continue
        taken.append(boxes[best])
        axes.annotate(
            words,
            boxes[best].mean(axis=0) / axes.figure.bbox.size,
            xycoords="figure fraction",
            fontsize=size,
            fontweight=weight,
            color=style.INK if index == last else style.FAINT,
            ha="center",
            va="center",
            annotation_clip=False,
            gid="step",
        )


def _line(start: FloatArray, end: FloatArray) -> FloatArray:
    return np.linspace(start, end, 2 + min(int(np.linalg.norm(end - start) / _APART), 1000))


def _cost(
    box: FloatArray, own: FloatArray, others: FloatArray, drawn: FloatArray, taken: Sequence[FloatArray], panel: Any
) -> float:
    """How much of what is drawn a box ``[low/high, x/y]`` hides; more than anything if it is on another label, out of
    the panel, or not nearest to its own point."""
    hidden = ((drawn > box[0]) & (drawn < box[1])).all(axis=1).sum()
    overlaps = sum(bool((box[0] < label[1]).all() and (box[1] > label[0]).all()) for label in taken)
    is_out = (box[0] < panel.min).any() or (box[1] > panel.max + _BEYOND).any()
    is_ambiguous = (_distance(others, box) < _distance(own, box) + 1).any()
    return float(hidden + _NEVER * (overlaps + 10 * is_out + is_ambiguous))


def _distance(points: FloatArray, box: FloatArray) -> FloatArray:
    away: FloatArray = np.linalg.norm(np.maximum(0, np.maximum(box[0] - points, points - box[1])), axis=-1)
    return away

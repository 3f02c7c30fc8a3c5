"""The colours that mean something: on the screen and in pictures, on light and on dark ground; the colour-blind tell
them apart.

They are Okabe and Ito's (https://jfly.uni-koeln.de/color/); the blue is lighter, to be read on a black screen, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

from mui_callback.layout import ExpertKind
from mui_callback.metrics.phases import Phase

_COLORS = ("#2388d1", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#7a6fd0")

EXPERT_COLORS: dict[ExpertKind, str] = dict(zip(get_args(ExpertKind), _COLORS, strict=False))
PHASE_COLORS = {
    Phase.EVOLVING: "#009e73",
    Phase.ACCUMULATING: "#2388d1",
    Phase.UNDECIDED: "#8a8f98",
    Phase.COARSENING: "#e69f00",
    Phase.COLLAPSING: "#c8102e",
}
PHASE_MARKERS = {
    Phase.EVOLVING: "v",
    Phase.ACCUMULATING: "^",
    Phase.UNDECIDED: "o",
    Phase.COARSENING: "D",
    Phase.COLLAPSING: "X",
}
"""The phases differ in shape as well; the triangles point where MUI goes."""


def colors_of(names: Iterable[str]) -> dict[str, str]:
    """A colour for each task or data set, in order; from the seventh on they repeat."""
    return {name: _COLORS[index % len(_COLORS)] for index, name in enumerate(names)}

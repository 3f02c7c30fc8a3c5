"""One colour a data set, on the screen and in the picture: the demo's three, and three more of Okabe and Ito's."""

from __future__ import annotations

from collections.abc import Iterable

_COLORS = ("#2388d1", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#7a6fd0")


def data_set_colors(names: Iterable[str]) -> dict[str, str]:
    """A colour for each data set, in order; from the seventh on they repeat."""
    return {name: _COLORS[index % len(_COLORS)] for index, name in enumerate(names)}

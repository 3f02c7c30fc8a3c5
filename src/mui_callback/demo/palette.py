"""One colour a task, on the screen and in the picture: the colour-blind tell them apart.

They are Okabe and Ito's blue, vermilion and green; the blue is lighter, to be read on a black screen, too.
"""

from __future__ import annotations

from collections.abc import Sequence

_COLORS = ("#2388d1", "#d55e00", "#009e73")


def task_colors(tasks: Sequence[str]) -> dict[str, str]:
    """A colour for each task, in order."""
    return {task: _COLORS[index % len(_COLORS)] for index, task in enumerate(tasks)}

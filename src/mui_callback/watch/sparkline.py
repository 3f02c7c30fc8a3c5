"""A series of numbers as a line of blocks."""

from __future__ import annotations

from collections.abc import Sequence

_BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int) -> str:
    """One block for each value, the lowest ▁ and the highest █; a middle one where all are equal, as for a single one.

    Args:
        values: finite; of more than `width`, the means of as many neighbouring ones as there must be.
        width: most blocks, at least 1.
    """
    n = min(len(values), width)
    parts = [values[i * len(values) // n : (i + 1) * len(values) // n] for i in range(n)]
    means = [sum(part) / len(part) for part in parts]
    if not means:
        return ""
    low, high = min(means), max(means)
    if low == high:
        return _BLOCKS[3] * n
    return "".join(_BLOCKS[round((mean - low) / (high - low) * (len(_BLOCKS) - 1))] for mean in means)

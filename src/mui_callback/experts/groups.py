"""Experts that go through their steps together.

On a GPU those are all of them, for each step is one kernel. On a CPU they are few: what one step makes of their rows is
in the cache of a core when the next one wants it.

Shapes: S rows that are sorted by expert, E experts, N inputs, M outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mui_callback.experts.grouped import grouped_mm

_ROWS = 512
"""Rows, at least, for which it pays to go through the steps anew."""


@dataclass(frozen=True)
class Group:
    """Consecutive experts, and their rows."""

    rows: slice
    experts: slice | None
    """None: all of them."""
    end_E: Tensor
    """End of the rows of each expert, from the first row of the group, int32."""

    def product(self, x_SN: Tensor, weight_ENM: Tensor) -> Tensor:
        """``x[s] @ weight[expert of s]`` for the rows of the group, ``[S, M]``; see `grouped_mm`.

        Args:
            x_SN: those rows.
            weight_ENM: the weights of all experts.
        """
        return grouped_mm(x_SN, weight_ENM if self.experts is None else weight_ENM[self.experts], self.end_E)


def by_group(make: Callable[[Group], tuple[Tensor, ...]], end_E: Tensor, n_rows: int) -> tuple[Tensor, ...]:
    """What is made of all rows.

    Args:
        make: what is made of those of a group, each ``[S, …]``.
        end_E: end of the rows of each expert, int32.
        n_rows: S, all of which are of an expert.
    """
    groups = _groups(end_E, n_rows)
    if len(groups) == 1:
        return make(groups[0])
    of_all: tuple[Tensor, ...] = ()
    for group in groups:
        made = make(group)
        of_all = of_all or tuple(part.new_empty(n_rows, *part.shape[1:]) for part in made)
        for whole, part in zip(of_all, made, strict=True):
            whole[group.rows] = part
    return of_all


def _groups(end_E: Tensor, n_rows: int) -> list[Group]:
    whole = Group(slice(0, n_rows), None, end_E)
    if end_E.device.type != "cpu" or n_rows < 2 * _ROWS:
        return [whole]
    groups, first, start = [], 0, 0
    for expert, end in enumerate(end_E.tolist()):
        if end - start >= _ROWS or (end == n_rows and end > start):
            experts = slice(first, expert + 1)
            groups.append(Group(slice(start, end), experts, end_E[experts] - start))
            first, start = expert + 1, end
    return groups if start == n_rows else [whole]

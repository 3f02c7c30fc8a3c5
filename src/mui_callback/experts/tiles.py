"""Tiles: consecutive experts that go through all their steps before the next ones do.

On a CPU, so that each step finds in the cache what the last one made. On a GPU all experts are one tile, for each step
is one kernel.

Shapes: S rows that are sorted by expert, E experts, N inputs, M outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mui_callback.experts.grouped import grouped_mm

_MIN_ROWS = 512
"""Fewest rows of a tile, but for the last one: below that, operators cost more than the cache saves."""


@dataclass(frozen=True)
class Tile:
    """Consecutive experts, and their rows."""

    rows: slice
    experts: slice | None
    """None where they are all."""
    end_E: Tensor
    """End of the rows of each expert, from the first row of the tile, int32."""

    def of(self, value_S: Tensor) -> Tensor:
        """What belongs to its rows, of all ``[S, …]``."""
        return value_S if self.experts is None else value_S[self.rows]

    def product(self, x_SN: Tensor, weight_ENM: Tensor) -> Tensor:
        """``x[s] @ weight[expert of s]`` for the rows of the tile, ``[S, M]``; see `grouped_mm`.

        Args:
            x_SN: those rows.
            weight_ENM: the weights of all experts.
        """
        return grouped_mm(x_SN, weight_ENM if self.experts is None else weight_ENM[self.experts], self.end_E)


def by_tile(make: Callable[[Tile], tuple[Tensor, ...]], end_E: Tensor, n_rows: int) -> tuple[Tensor, ...]:
    """Call `make` on each tile, and put together what it returns.

    Args:
        make: makes tensors of the rows of a tile, each ``[S, …]``.
        end_E: end of the rows of each expert, int32; on a CPU the host reads it.
        n_rows: S, all of which are of an expert.

    Returns:
        What `make` returns, for all rows, ``[S, …]`` each.
    """
    tiles = _tiles(end_E, n_rows)
    if len(tiles) == 1:
        return make(tiles[0])
    of_all: tuple[Tensor, ...] = ()
    for tile in tiles:
        made = make(tile)
        of_all = of_all or tuple(part.new_empty(n_rows, *part.shape[1:]) for part in made)
        for whole, part in zip(of_all, made, strict=True):
            whole[tile.rows] = part
    return of_all


def _tiles(end_E: Tensor, n_rows: int) -> list[Tile]:
    if end_E.device.type != "cpu" or n_rows < 2 * _MIN_ROWS:
        return [Tile(slice(0, n_rows), None, end_E)]
    tiles, first, start = [], 0, 0
    for expert, end in enumerate(end_E.tolist()):
        if end - start >= _MIN_ROWS or (end == n_rows and end > start):
            experts = slice(first, expert + 1)
            tiles.append(Tile(slice(start, end), experts, end_E[experts] - start))
            first, start = expert + 1, end
    return tiles

"""Where the passes over the contributions of layers leave what they find.

Shapes: L layers that are made together, B samples, R scored tokens, P slots of a sample, C chunks of a row, E experts
of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from mui_callback.fused.scores import Found
from mui_callback.scoring.contributions import Responses
from mui_callback.scoring.rows import NOTHING, joined

_TOGETHER = 2**25
"""Bytes that are made at once for several layers, as that takes fewer operators."""


class LayerBuffers:
    """Makes them for the layers of a batch, one after the other, and adds up what their experts did.

    Args:
        tokens: the scored tokens.
        n_layers: how many layers there are at most.
    """

    def __init__(self, tokens: Responses, n_layers: int = 1) -> None:
        self.tokens = tokens
        self.n_not_finite = torch.zeros((), dtype=torch.int32, device=tokens.row_R.device)
        """How many contributions of all layers are NaN or infinite."""
        self._n_left = n_layers
        self._open: dict[tuple[int, int, int], _Together] = {}
        self._use: list[tuple[list[int], Tensor]] = []

    def take(self, layer: int, n_ranks: int, n_chunks: int, n_experts: int) -> Found:
        """Empty ones for a layer.

        Args:
            layer: its number.
            n_ranks: rows of a token.
            n_chunks: C.
            n_experts: E.
        """
        key = (n_ranks, n_chunks, n_experts)
        if key in self._open and self._open[key].is_full:
            self._use.append(self._open.pop(key).use())
        if key not in self._open:
            self._open[key] = _Together(self.tokens, *key, n_left=self._n_left)
        self._n_left = max(1, self._n_left - 1)
        return self._open[key].take(layer, self.n_not_finite)

    def use(self) -> tuple[list[int], Tensor]:
        """The numbers of all layers and, behind one another, Σ|f| and number of rows of each sample in each of their
        experts, float64 ``[B, …, 2]``; after the last layer."""
        found = [*self._use, *(together.use() for together in self._open.values())]
        self._use, self._open = [], {}
        return [layer for layers, _ in found for layer in layers], joined([use for _, use in found], dim=1)


@dataclass
class _Together:
    tokens: Responses
    n_ranks: int
    n_chunks: int
    n_experts: int
    n_left: int
    layers: list[int] = field(default_factory=list)

    @cached_property
    def _size(self) -> int:
        n_tokens, n_places = len(self.tokens.row_R), self.tokens.n_rows * self.tokens.n_orders * self.n_ranks
        n_bytes = 16 * n_tokens * (self.n_experts + 1) + n_places * (4 * (1 + self.n_chunks) + 8)
        return min(self.n_left, max(1, _TOGETHER // max(1, n_bytes)))

    @cached_property
    def _found(self) -> tuple[Tensor, Tensor, Tensor]:
        places, device = (self._size, self.tokens.n_rows, self.tokens.n_orders * self.n_ranks), self.tokens.row_R.device
        return (
            torch.full((*places, 1 + self.n_chunks), NOTHING, dtype=torch.float32, device=device),
            torch.zeros(places, dtype=torch.int64, device=device),
            torch.zeros(
                *(len(self.tokens.row_R), self._size, self.n_experts + 1, 2), dtype=torch.float64, device=device
            ),
        )

    @property
    def is_full(self) -> bool:
        return len(self.layers) == self._size

    def take(self, layer: int, n_not_finite: Tensor) -> Found:
        highest_LBPC, row_LBP, use_RLE2 = self._found
        number = len(self.layers)
        self.layers.append(layer)
        return Found(highest_LBPC[number], row_LBP[number], use_RLE2[:, number], n_not_finite, self.n_ranks)

    def use(self) -> tuple[list[int], Tensor]:
        use_RLE2 = self._found[2]
        use_BLE2 = torch.mm(self.tokens.is_of_BR, use_RLE2.flatten(1)).view(-1, *use_RLE2.shape[1:])
        return self.layers, use_BLE2[:, : len(self.layers), :-1].flatten(1, 2)

"""Values of experts as matrices: one row for each layer, and one matrix for each kind of expert.

Shapes: L layers, E experts of all layers, n experts of a kind in a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mui_callback.layout import ExpertLayout
from mui_callback.metrics.utilization import FloatArray


@dataclass(frozen=True)
class ExpertBlock:
    """The experts of one kind."""

    kind: str
    """``"routed"``, ``"shared"`` or ``"dense"``."""
    labels: tuple[str, ...]
    """Of its columns: ``E0, E1, …``, ``S1, S2, …`` or ``MLP``, ``[n]``."""
    values: FloatArray
    """Float64 ``[L, n]``; NaN where a layer has no such expert."""


def expert_blocks(layout: ExpertLayout, values_E: FloatArray) -> list[ExpertBlock]:
    """The routed experts, the shared ones and, in a model with MoE layers, the MLPs of its dense layers.

    A layer that is one expert (see ``dense=True`` in `MUIProbe`) is dense. A kind that no layer has is left out.

    Args:
        layout: the numbering.
        values_E: of each expert, ``[E]``.
    """
    n_routed, n_shared, n_dense = (
        [layer.expert_kinds.count(kind) for layer in layout.layers] for kind in ("routed", "shared", "dense")
    )
    sizes = {
        "routed": (n_routed, [f"E{index}" for index in range(max(n_routed))]),
        "shared": (n_shared, [f"S{index + 1}" for index in range(max(n_shared))]),
        "dense": (n_dense, ["MLP"] * max(n_dense)),
    }
    rows = [values_E[layout.layer_of_expert == position] for position in range(len(layout.layers))]
    starts = {"routed": [0] * len(rows), "shared": n_routed, "dense": [0] * len(rows)}
    return [
        ExpertBlock(kind, tuple(labels), _block(rows, starts[kind], n_L, len(labels)))
        for kind, (n_L, labels) in sizes.items()
        if labels
    ]


def _block(rows: list[FloatArray], start_L: list[int], n_L: list[int], width: int) -> FloatArray:
    block = np.full((len(rows), width), np.nan)
    for row, values, start, n in zip(block, rows, start_L, n_L, strict=True):
        row[:n] = values[start : start + n]
    return block

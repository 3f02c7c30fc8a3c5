"""Random controls of a set of neurons or experts: as many of the same layer and kind (routed or shared).

What a task loses without its key neurons says little by itself; it is compared with what it loses without as many that
were drawn at random. Layer and kind are the same, since the first layers of a model and its shared experts, which every
token passes through, matter more than others whoever is key there.

Shapes: J neurons and E experts of all layers (see `ExpertLayout`), M members of either kind.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mui_callback.layout import ExpertLayout
from mui_callback.metrics.utilization import BoolArray, IntArray


@dataclass(frozen=True, eq=False)
class RandomControl:
    """Members that were drawn at random."""

    is_drawn: BoolArray
    """``[M]``."""
    n_overlap: int
    """Key ones among them: drawn only where fewer others remain than are needed."""


def stratum_of_experts(layout: ExpertLayout) -> IntArray:
    """A number for each expert that is the same for those of one layer and kind, int64 ``[E]``."""
    return 2 * layout.layer_of_expert + layout.is_shared


def neurons_of_experts(layout: ExpertLayout, is_in_E: BoolArray) -> BoolArray:
    """All neurons of some experts, bool ``[J]``."""
    return np.repeat(is_in_E, layout.width)


def random_neurons(layout: ExpertLayout, is_key_J: BoolArray, rng: np.random.Generator) -> RandomControl:
    """As many neurons of each layer and kind as are key ones there; of the others as far as there are enough.

    Args:
        layout: the numbering.
        is_key_J: the key neurons, bool ``[J]``.
        rng: what they are drawn with, without replacement and each with the same probability.

    Raises:
        ValueError: `is_key_J` has another shape or dtype.
    """
    return _draw(is_key_J, np.repeat(stratum_of_experts(layout), layout.width), rng)


def random_experts(layout: ExpertLayout, is_key_E: BoolArray, rng: np.random.Generator) -> RandomControl:
    """As many experts of each layer and kind as are key ones there; see `random_neurons`."""
    return _draw(is_key_E, stratum_of_experts(layout), rng)


def _draw(is_key_M: BoolArray, stratum_M: IntArray, rng: np.random.Generator) -> RandomControl:
    if is_key_M.shape != stratum_M.shape or is_key_M.dtype != bool:
        raise ValueError(
            f"expected which are key as bool {list(stratum_M.shape)}, got {is_key_M.dtype} {list(is_key_M.shape)}"
        )
    # a shuffled list of each stratum, key ones last; its first are taken
    order_M = np.lexsort((rng.random(len(stratum_M)), is_key_M, stratum_M))
    size_S, n_key_S = np.bincount(stratum_M), np.bincount(stratum_M, weights=is_key_M).astype(np.int64)
    place_M = np.arange(len(order_M)) - np.repeat(np.cumsum(size_S) - size_S, size_S)
    is_drawn = np.zeros(len(order_M), dtype=np.bool_)
    is_drawn[order_M[place_M < np.repeat(n_key_S, size_S)]] = True
    return RandomControl(is_drawn, int((is_drawn & is_key_M).sum()))

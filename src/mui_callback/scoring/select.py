"""The entries of a layer that threshold rules take; see `mui_callback.rules`.

Shapes: L layers, B samples, P slots of a sample, C chunks of a slot, c neurons of a chunk; M chunks or entries, U
different ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mui_callback.scoring.layer_rows import LayerRows
from mui_callback.scoring.rows import CHUNK, NOTHING


@dataclass(frozen=True)
class NeuronScores:
    """Neurons of some samples in one layer, each once, with its highest contribution; ordered by sample."""

    sample_M: Tensor
    """Number in the batch, int64 ``[M]``."""
    neuron_M: Tensor
    """Number in the layer, int64 ``[M]``."""
    score_M: Tensor
    """float32 ``[M]``."""

    def at_least(self, threshold_B: Tensor) -> NeuronScores:
        """Those whose score is no less than the threshold of their sample."""
        is_in_M = self.score_M >= threshold_B[self.sample_M]
        return NeuronScores(self.sample_M[is_in_M], self.neuron_M[is_in_M], self.score_M[is_in_M])


def thresholds(ratio: float, highest_B: Tensor) -> Tensor:
    """The lowest float32 that is no less than ``ratio`` times the highest score of each sample, float32 ``[B]``.

    Infinite where there is no score, so that nothing is above it.
    """
    exact_B = ratio * highest_B.double()
    rounded_B = exact_B.float()
    up_B = torch.nextafter(rounded_B, torch.full_like(rounded_B, float("inf")))
    return torch.where(rounded_B < exact_B, up_B, rounded_B).masked_fill(highest_B == NOTHING, float("inf"))


def neurons_above(rows: LayerRows, layer: int, n_neurons: int, threshold_B: Tensor) -> NeuronScores:
    """Each sample's neurons that have an entry of at least its threshold in one of some layers.

    How many there are is asked of the device, which waits for it.
    """
    sample_M, slot_M, chunk_M = torch.nonzero(
        rows.found.highest_LBPC[layer, ..., 1:] >= threshold_B[:, None, None], as_tuple=True
    )
    score_Mc, neuron_M = rows.of_chunks(layer, rows.found.row_LBP[layer, sample_M, slot_M], chunk_M)
    is_above_Mc = score_Mc >= threshold_B[sample_M][:, None]
    key_Mc = (sample_M * n_neurons + neuron_M)[:, None] + torch.arange(CHUNK, device=neuron_M.device)
    return highest_of_each(key_Mc[is_above_Mc], score_Mc[is_above_Mc], n_neurons)


def highest_of_each(key_M: Tensor, score_M: Tensor, n_neurons: int) -> NeuronScores:
    """Entries whose key is ``sample · n_neurons + neuron``, of equal ones the highest."""
    key_U, place_M = torch.unique(key_M, return_inverse=True)
    score_U = score_M.new_full(key_U.shape, NOTHING).scatter_reduce_(0, place_M, score_M, "amax")
    return NeuronScores(key_U // n_neurons, key_U % n_neurons, score_U)

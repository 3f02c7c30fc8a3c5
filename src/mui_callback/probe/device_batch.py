"""A batch on the device of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from mui_callback.probe.encode import Batch
from mui_callback.scoring.contributions import ScoredTokens


@dataclass(frozen=True)
class DeviceBatch:
    """Tensors of one forward pass; B samples of T positions."""

    input_ids: Tensor
    """int64 ``[B, T]``."""
    attention_mask: Tensor
    """int64 ``[B, T]``."""
    sample_B: Tensor
    """Index of each row's sequence, int64 ``[B]``."""
    tokens: ScoredTokens


def to_device(batch: Batch, device: torch.device) -> DeviceBatch:
    """Copy a batch to the device."""

    def move(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    n_rows, length = batch.input_ids.shape
    return DeviceBatch(
        input_ids=move(batch.input_ids),
        attention_mask=move(batch.attention_mask),
        sample_B=move(batch.sample),
        tokens=ScoredTokens(
            position_R=move(batch.flat_position),
            row_R=move(batch.row),
            order_R=move(batch.order),
            target_R=move(batch.target),
            n_rows=n_rows,
            n_orders=batch.n_scored_max,
            length=length,
        ),
    )

"""A batch on the device of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from mui_callback.probe.batches import Batch
from mui_callback.scoring.contributions import ScoredTokens


@dataclass(frozen=True)
class DeviceBatch:
    """Tensors of one forward pass; B samples of T positions, and of S in front of an encoder."""

    input_ids: Tensor
    """int64 ``[B, T]``; an encoder-decoder's decoder reads it."""
    attention_mask: Tensor
    """int64 ``[B, T]``."""
    encoder_ids: Tensor | None
    """int64 ``[B, S]``, for an encoder-decoder only."""
    encoder_mask: Tensor | None
    """int64 ``[B, S]``, for an encoder-decoder only."""
    sample_B: Tensor
    """Index of each row's sequence, int64 ``[B]``."""
    tokens: ScoredTokens

    @property
    def model_inputs(self) -> dict[str, Any]:
        """What the model is called with, under the names that transformers has for it."""
        if self.encoder_ids is None or self.encoder_mask is None:
            return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return {
            "input_ids": self.encoder_ids,
            "attention_mask": self.encoder_mask,
            "decoder_input_ids": self.input_ids,
            "decoder_attention_mask": self.attention_mask,
        }


def to_device(batch: Batch, device: torch.device) -> DeviceBatch:
    """Copy a batch to the device."""

    def move(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    n_rows, length = batch.input_ids.shape
    return DeviceBatch(
        input_ids=move(batch.input_ids),
        attention_mask=move(batch.attention_mask),
        encoder_ids=None if batch.encoder_ids is None else move(batch.encoder_ids),
        encoder_mask=None if batch.encoder_mask is None else move(batch.encoder_mask),
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

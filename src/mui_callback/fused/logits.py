"""One pass over logits, which computes what `mui_callback.probe.head` does without it, up to rounding in float32.

Shapes: R scored tokens, V vocabulary.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from mui_callback.fused.available import can_run

_LOGITS = 4096
"""Logits that are in registers at a time."""


def can_predict(logits_RV: Tensor) -> bool:
    """Whether there is a kernel for `predictions` of these logits."""
    return logits_RV.dtype.itemsize <= 4 and can_run(logits_RV)


def predictions(logits_RV: Tensor, target_R: Tensor) -> tuple[Tensor, Tensor]:
    """See `mui_callback.probe.head.token_losses`."""
    n_rows, n_logits = logits_RV.shape
    loss_R = torch.empty(n_rows, dtype=torch.float32, device=logits_RV.device)
    is_correct_R = torch.empty(n_rows, dtype=torch.bool, device=logits_RV.device)
    _kernels().predictions.launch(
        (n_rows,),
        (logits_RV, target_R.contiguous(), loss_R, is_correct_R),
        (n_logits, logits_RV.stride(0)),
        BLOCK=_LOGITS,
    )
    return loss_R, is_correct_R


@cache
def _kernels() -> Any:
    from mui_callback.fused import triton_logits

    return triton_logits

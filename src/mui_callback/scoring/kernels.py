"""Fused passes over contributions and logits, for GPUs where Triton runs.

They compute what `mui_callback.scoring.rows` and `mui_callback.probe.head` do without them: products are the same to
the bit, sums up to rounding in float32.

Shapes: S rows, I neurons of an expert, C chunks of neurons of a row, M chunks that are chosen, c neurons of a chunk, R
scored tokens, V vocabulary.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_BLOCK = 1024
"""Neurons that are in registers at a time."""
_LOGITS = 4096
"""Logits that are."""


def can_run(act_SI: Tensor, projected_SI: Tensor) -> bool:
    """Whether there are kernels for these tensors."""
    is_laid_out = act_SI.stride(-1) == projected_SI.stride(-1) == 1 and act_SI.numel() > 0
    return act_SI.device.type == "cuda" and is_laid_out and _kernels(act_SI.device) is not None


def can_order(score_BM: Tensor) -> bool:
    """Whether there is a kernel for `order_keys` of these scores."""
    is_plain = score_BM.dtype == torch.float32 and score_BM.is_contiguous() and score_BM.numel() > 0
    return is_plain and score_BM.device.type == "cuda" and _kernels(score_BM.device) is not None


def order_keys(score_BM: Tensor) -> Tensor:
    """Numbers that are in the order of the scores and, of equal ones, against that of the columns, int64 ``[B, M]``."""
    key_BM = torch.empty(score_BM.shape, dtype=torch.int64, device=score_BM.device)
    kernels, n_scores = _kernels(score_BM.device), score_BM.numel()
    assert kernels is not None
    with torch.cuda.device(score_BM.device):
        kernels.order_keys[(-(-n_scores // _BLOCK),)](score_BM, key_BM, n_scores, score_BM.shape[1], BLOCK=_BLOCK)
    return key_BM


def summarize(
    act_SI: Tensor,
    projected_SI: Tensor,
    weight_S: Tensor | None,
    is_row_S: Tensor | None,
    chunk: int,
    *,
    is_signed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ|f| of each row, or Σ f, float32 ``[S]``; the highest f of each chunk, float32 ``[S, C]``; how many are not
    finite.

    See `Contributions.summary` and `Contributions.sums`.
    """
    (n_rows, width), device = act_SI.shape, act_SI.device
    n_chunks = -(-width // chunk)
    mass_S = torch.empty(n_rows, dtype=torch.float32, device=device)
    highest_SC = torch.empty(n_rows, n_chunks, dtype=torch.float32, device=device)
    n_bad = torch.zeros((), dtype=torch.int32, device=device)
    kernels = _kernels(device)
    assert kernels is not None
    block = min(max(1, _BLOCK // chunk), 1 << (n_chunks - 1).bit_length())
    with torch.cuda.device(device):
        kernels.summarize[(n_rows,)](
            *(act_SI, projected_SI, weight_S, is_row_S, mass_S, highest_SC, n_bad),
            *(width, n_chunks, act_SI.stride(0), projected_SI.stride(0)),
            HAS_WEIGHT=weight_S is not None,
            HAS_ROWS=is_row_S is not None,
            IS_SIGNED=is_signed,
            CHUNK=chunk,
            BLOCK=block,
        )
    return mass_S, highest_SC, n_bad.long()


def of_chunks(
    act_SI: Tensor,
    projected_SI: Tensor,
    weight_S: Tensor | None,
    is_row_S: Tensor | None,
    row_M: Tensor,
    chunk_M: Tensor,
    chunk: int,
) -> Tensor:
    """The contributions of the neurons of some chunks, float32 ``[M, c]``; see `Contributions.of_chunks`."""
    score_Mc = torch.empty(len(row_M), chunk, dtype=torch.float32, device=act_SI.device)
    kernels = _kernels(act_SI.device)
    assert kernels is not None
    if len(row_M):
        with torch.cuda.device(act_SI.device):
            kernels.of_chunks[(len(row_M),)](
                *(act_SI, projected_SI, weight_S, is_row_S, row_M, chunk_M, score_Mc),
                *(act_SI.shape[1], act_SI.stride(0), projected_SI.stride(0)),
                HAS_WEIGHT=weight_S is not None,
                HAS_ROWS=is_row_S is not None,
                CHUNK=chunk,
                num_warps=1,
            )
    return score_Mc


def can_predict(logits_RV: Tensor) -> bool:
    """Whether there is a kernel for `predictions` of these logits."""
    is_laid_out = logits_RV.stride(-1) == 1 and logits_RV.numel() > 0 and logits_RV.dtype.itemsize <= 4
    return is_laid_out and logits_RV.device.type == "cuda" and _kernels(logits_RV.device) is not None


def predictions(logits_RV: Tensor, target_R: Tensor) -> tuple[Tensor, Tensor]:
    """See `mui_callback.probe.head.token_losses`."""
    n_rows, n_logits = logits_RV.shape
    loss_R = torch.empty(n_rows, dtype=torch.float32, device=logits_RV.device)
    is_correct_R = torch.empty(n_rows, dtype=torch.bool, device=logits_RV.device)
    kernels = _kernels(logits_RV.device)
    assert kernels is not None
    with torch.cuda.device(logits_RV.device):
        kernels.predictions[(n_rows,)](
            *(logits_RV, target_R.contiguous(), loss_R, is_correct_R, n_logits, logits_RV.stride(0)), BLOCK=_LOGITS
        )
    return loss_R, is_correct_R


@cache
def _kernels(device: torch.device) -> Any:
    """The compiled kernels; None where they cannot be compiled or do not run."""
    try:
        from mui_callback.scoring import triton_kernels

        one = torch.ones(1, 1, device=device)
        triton_kernels.try_out(one)
    except Exception as error:  # whatever a compiler or a driver raises
        logger.info("MUI: no fused kernels on %s, slower operators do the same (%s)", device, error)
        return None
    return triton_kernels

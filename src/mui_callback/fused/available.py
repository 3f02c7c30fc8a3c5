"""Whether the kernels run on a device."""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def can_run(*tensors: Tensor) -> bool:
    """Whether there are kernels for these tensors: on a GPU, not empty, with columns that lie next to each other."""
    if not tensors[0].is_cuda:
        return False
    are_laid_out = all(tensor.stride(-1) == 1 and tensor.numel() > 0 for tensor in tensors)
    return are_laid_out and runs_on(tensors[0].device)


@cache
def runs_on(device: torch.device) -> bool:
    """Whether the kernels can be compiled for a device, and run there."""
    try:
        from mui_callback.fused import trial

        with torch.cuda.device(device):
            one = torch.ones(1, 1, device=device)
            trial.try_out(one)
            if not trial.try_compiled(one):
                logger.info("MUI: Triton finds compiled kernels anew in each launch")
    except Exception as error:  # whatever a compiler or a driver raises
        logger.info("MUI: no fused kernels on %s, slower operators do the same (%s)", device, error)
        return False
    return True

"""Trying kernels out before they are relied on; imported where Triton is there."""

from __future__ import annotations

import torch
from torch import Tensor

from mui_callback.fused.launching import Kernel
from mui_callback.fused.triton_scores import choose, order_keys, sums


def try_out(one: Tensor) -> None:
    """Run what takes the newest version of Triton, as it is run later; raises whatever does not work."""
    order_keys.launch((1,), (one, torch.zeros_like(one, dtype=torch.int64)), (1, 1), BLOCK=1024)
    _choose_one(one)


def try_compiled(one: Tensor) -> bool:
    """Whether a compiled kernel can be launched again, in this version of Triton, and does the same."""
    if torch.version.hip is not None:  # where kernels are also compiled anew for the sizes of tensors
        return False
    Kernel.keeps_compiled = True
    try:
        Kernel.keeps_compiled = all(not _choose_one(one).any() and (_sum_two(one) == 2).all() for _ in range(2))
    except Exception:  # whatever it makes of arguments that it does not want
        Kernel.keeps_compiled = False
    return Kernel.keeps_compiled


def _choose_one(one: Tensor) -> Tensor:
    """The number of the only chunk, 0; -1 where nothing was run."""
    slot, chosen = (torch.full_like(one, -1, dtype=torch.int64) for _ in range(2))
    choose.launch((1,), (one.new_ones(2), slot, chosen), (1, 1, 1, 1), BLOCK=2048, num_warps=8)
    return chosen


def _sum_two(one: Tensor) -> Tensor:
    """1 + 1, without the tensors that contributions may do without."""
    two, total = one.new_ones(1, 2), torch.zeros_like(one)
    sums.launch(
        (1,),
        (two, None, two, None, None, total),
        (2, 2, 2),
        HAS_ACT_ROW=False,
        HAS_WEIGHT=False,
        HAS_ROWS=False,
        BLOCK=1024,
    )
    return total

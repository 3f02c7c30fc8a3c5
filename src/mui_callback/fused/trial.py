"""Trying kernels out before they are relied on; imported where Triton is there."""

from __future__ import annotations

import torch
from torch import Tensor

from mui_callback.fused.launching import Kernel
from mui_callback.fused.triton_scores import choose, order_keys


def try_out(one: Tensor) -> None:
    """Run what takes the newest version of Triton, as it is run later; raises whatever does not work."""
    number, two = one.long() * 0, one.new_ones(2)
    order_keys.launch((1,), (one, number.clone()), (1, 1), BLOCK=1024)
    for slots in (None, number):
        _choose_one(two, slots, number.clone())


def _choose_one(two: Tensor, slots: Tensor | None, chosen: Tensor) -> None:
    choose.launch((1,), (two, slots, chosen), (1, 1, 1, 1), HAS_SLOTS=slots is not None, BLOCK=2048, num_warps=8)


def try_compiled(one: Tensor) -> bool:
    """Whether a compiled kernel can be launched again, in this version of Triton, and does the same."""
    if torch.version.hip is not None:  # where kernels are also compiled anew for the sizes of tensors
        return False
    two, found = one.new_ones(2), [torch.full_like(one, -1, dtype=torch.int64) for _ in range(2)]
    Kernel.keeps_compiled = True
    try:
        for chosen in found:
            _choose_one(two, None, chosen)
        Kernel.keeps_compiled = not any(chosen.any() for chosen in found)
    except Exception:  # whatever it makes of arguments that it does not want
        Kernel.keeps_compiled = False
    return Kernel.keeps_compiled

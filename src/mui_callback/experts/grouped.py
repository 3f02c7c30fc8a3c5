"""One matrix product per expert over rows that are sorted by expert.

Shapes: S rows, E experts, N inputs, M outputs.
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=16)
def numbers(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0 … n - 1, kept for the next one who asks; not to be written to."""
    with torch.inference_mode(False):
        return torch.arange(n, dtype=dtype, device=device)


def group_ends(expert_S: Tensor, n_experts: int) -> Tensor:
    """End of each expert's rows, int32 ``[E]``, for expert ids ``[S]`` of any integer type in ascending order.

    Rows with an id of `n_experts` or more belong to no group. Nothing is moved to the host.
    """
    experts = numbers(n_experts, expert_S.dtype, expert_S.device)
    return torch.searchsorted(expert_S, experts, right=True, out_int32=True)


def grouped_mm(x_SN: Tensor, weight_ENM: Tensor, end_E: Tensor) -> Tensor:
    """``x[s] @ weight[expert of s]`` for every row, ``[S, M]`` in the dtype of the weight.

    A row that belongs to no expert may get any values.

    Uses `torch.nn.functional.grouped_mm` where the layout and the dtype allow it; elsewhere one product per
    expert, which costs one read of the offsets by the host.
    """
    x_SN = x_SN.to(weight_ENM.dtype)
    if len(weight_ENM) == 1:
        return x_SN @ weight_ENM[0]
    if _has_kernel(x_SN, weight_ENM):
        return torch.nn.functional.grouped_mm(x_SN, weight_ENM, offs=end_E)
    out_SM = x_SN.new_zeros(x_SN.shape[0], weight_ENM.shape[2])
    start = 0
    for expert, end in enumerate(end_E.tolist()):
        if end > start:
            out_SM[start:end] = x_SN[start:end] @ weight_ENM[expert]
        start = end
    return out_SM


def _has_kernel(x_SN: Tensor, weight_ENM: Tensor) -> bool:
    return _has_kernel_for(weight_ENM.device, weight_ENM.dtype) and _is_aligned(x_SN) and _is_aligned(weight_ENM)


@cache
def _has_kernel_for(device: torch.device, dtype: torch.dtype) -> bool:
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return False
    if device.type == "cuda":
        return dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)


def _is_aligned(x: Tensor) -> bool:
    """The kernel wants every stride but the unit one, and the start, to be multiples of 16 bytes."""
    size = x.element_size()
    return x.data_ptr() % 16 == 0 and all(stride == 1 or stride * size % 16 == 0 for stride in x.stride()[-2:])

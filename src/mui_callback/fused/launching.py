"""Launching kernels of Triton; imported where Triton is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, reduce
from operator import or_
from typing import Any

import torch
import triton
from torch import Tensor


class Kernel:
    """A kernel, whose compiled forms are kept by what they were compiled for.

    Triton finds the compiled form of a kernel anew at each launch, for which it looks at every argument; with small
    batches the host takes longer for that than the device for the kernel.

    Args:
        function: what `triton.jit` made.
    """

    keeps_compiled = False
    """Whether this version of Triton launches a compiled form with all arguments in their order."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self._compiled: dict[tuple[object, ...], Any] = {}

    def launch(
        self, grid: tuple[int, ...], tensors: Sequence[Tensor | None], numbers: Sequence[float] = (), **constants: Any
    ) -> None:
        """Run it on the device of the first tensor, which need not be the present one.

        Args:
            grid: programs, along up to three axes.
            tensors: the first arguments of the kernel; the first one is there.
            numbers: the next ones, int or float.
            constants: what it is compiled with, in the order of the kernel behind the numbers, and `num_warps`.
        """
        first = tensors[0]
        assert first is not None
        index = first.device.index
        if index == torch.cuda.current_device():
            self._launch(index, grid, tensors, numbers, constants)
        else:
            with torch.cuda.device(index):
                self._launch(index, grid, tensors, numbers, constants)

    def _launch(
        self,
        index: int,
        grid: tuple[int, ...],
        tensors: Sequence[Tensor | None],
        numbers: Sequence[float],
        constants: dict[str, Any],
    ) -> None:
        if not Kernel.keeps_compiled:
            self._function[grid](*tensors, *numbers, **constants)
            return
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        are_aligned = reduce(or_, filter(None, pointers)) % 16 == 0
        alignment = () if are_aligned else tuple(pointer and pointer % 16 for pointer in pointers)
        key = (index, *dtypes, alignment, *map(_specialization, numbers), *constants.values())
        compiled = self._compiled.get(key)
        if compiled is None:
            self._compiled[key] = self._function[grid](*tensors, *numbers, **constants)
            return
        compiled.run(
            *(*grid, 1, 1)[:3],
            triton.runtime.driver.active.get_current_stream(index),
            *(compiled.function, compiled.packed_metadata),
            *(None, None, None),  # what profilers of Triton hang in
            *pointers,
            *numbers,
            *(value for name, value in constants.items() if name != "num_warps"),
        )


@lru_cache(maxsize=2**12, typed=True)
def _specialization(number: float) -> int:
    """What Triton compiles anew for."""
    if isinstance(number, float):
        return -1
    return (number % 16 == 0) | (number == 1) << 1 | (number >= 2**31) << 2


def kernel(**options: Any) -> Callable[[Callable[..., None]], Kernel]:
    """Makes a kernel of a function, with options of `triton.jit`."""
    return lambda function: Kernel(triton.jit(function, **options))

"""Launching kernels of Triton; imported where Triton is there."""

from __future__ import annotations

from collections.abc import Callable
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

    def launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        """Run it on the device of its first argument.

        Args:
            grid: programs, along up to three axes.
            args: tensors, None or numbers, in the order of the kernel.
            constants: what it is compiled with, in the order of the kernel behind the arguments, and `num_warps`.
        """
        device: torch.device = args[0].device
        if device.index == torch.cuda.current_device():
            self._launch(grid, args, constants)
        else:
            with torch.cuda.device(device):
                self._launch(grid, args, constants)

    def _launch(self, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        if not Kernel.keeps_compiled:
            self._function[grid](*args, **constants)
            return
        key: list[object] = [args[0].device.index, *constants.values()]
        values = []
        for arg in args:
            if isinstance(arg, Tensor):
                value = arg.data_ptr()
                key += (arg.dtype, value % 16)
            else:
                value = arg
                key.append(_kind(value))
            values.append(value)
        compiled = self._compiled.get(tuple(key))
        if compiled is None:
            self._compiled[tuple(key)] = self._function[grid](*args, **constants)
        else:
            compiled[(*grid, 1, 1)[:3]](*values, *(value for name, value in constants.items() if name != "num_warps"))


def _kind(value: Any) -> object:
    """What a number or None is compiled for."""
    if type(value) is int:
        return (value % 16 == 0) + 2 * (value == 1) + 4 * (value >= 2**31)
    return type(value)


def kernel(**options: Any) -> Callable[[Callable[..., None]], Kernel]:
    """Makes a kernel of a function, with options of `triton.jit`."""
    return lambda function: Kernel(triton.jit(function, **options))

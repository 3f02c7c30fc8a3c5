"""Shared experts: MLPs beside the routed experts that every token passes through.

Shapes: T positions, R rows, W neurons of all shared experts in one module, n of those experts, I neurons of each,
D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from mui_callback.errors import UnsupportedModelError

SHARED_NAMES = ("shared_expert", "shared_experts", "shared_mlp")
"""Names under which models keep their shared experts."""

_DOWN_NAMES = ("down_proj", "output_linear", "fc2", "w2", "c_proj", "wo")


class SharedExperts(Protocol):
    """A module of shared experts, however it keeps its weights."""

    path: str
    module: nn.Module
    width: int
    """Neurons of all its experts, W."""
    expert_width: int
    """Neurons of each, I."""

    def watch(self, take: Callable[[Tensor], None]) -> list[RemovableHandle]:
        """Hooks that hand over the activations in front of the down projection, ``[T, W]``, at each forward."""

    def project(self, readout_RD: Tensor) -> Tensor:
        """⟨W_d[:, j], readout⟩ for each neuron j, ``[R, W]`` in the dtype of the weight."""

    def output_bias(self, readout_RD: Tensor) -> Tensor | None:
        """⟨b_d, readout⟩ of each row, ``[R]``; None without such a bias."""


def find_shared_experts(path: str, block: nn.Module, routed_width: int) -> tuple[SharedExperts, ...]:
    """The shared experts that `block` holds under one of `SHARED_NAMES`.

    Raises:
        UnsupportedModelError: there are shared experts, but what they write through cannot be told.
    """
    children = {f"{path}.{name}": getattr(block, name, None) for name in SHARED_NAMES}
    return tuple(
        _read_layout(child_path, module, routed_width)
        for child_path, module in children.items()
        if isinstance(module, nn.Module)
    )


def _read_layout(path: str, module: nn.Module, routed_width: int) -> SharedExperts:
    module = getattr(module, "_orig_mod", module)  # compiled by itself
    down = getattr(module, "down_proj", None)
    if isinstance(down, Tensor) and down.dim() == 3 and _is_plain(down):
        return StackedSharedExperts(path, module, down)
    linears = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
    for name in _DOWN_NAMES:
        if name in linears and _is_plain(linears[name].weight):
            return SharedMLP(path, module, linears[name], routed_width)
    raise UnsupportedModelError(
        f"{path}: expected shared experts whose down projection is a linear layer named one of "
        f"{', '.join(_DOWN_NAMES)}, or a parameter down_proj [experts, width, neurons], with plain floating-point "
        f"weights; found {', '.join(linears) or 'no linear layer'} in {type(module).__name__}."
    )


def _is_plain(weight: Tensor) -> bool:
    """Neither quantised nor sharded over processes."""
    return weight.dtype.is_floating_point and weight.dtype.itemsize > 1 and weight.numel() > 0


class SharedMLP:
    """One MLP with a linear down projection.

    A fused one counts as several experts of the routed width where that divides its own, else as one expert.
    """

    def __init__(self, path: str, module: nn.Module, down: nn.Linear, routed_width: int) -> None:
        self.path = path
        self.module = module
        self.down = down
        self.width = down.in_features
        self.expert_width = routed_width if self.width % routed_width == 0 else self.width

    def watch(self, take: Callable[[Tensor], None]) -> list[RemovableHandle]:
        """See `SharedExperts.watch`."""

        def read(down: nn.Module, args: tuple[Tensor, ...]) -> None:
            take(args[0].flatten(0, -2))

        return [self.down.register_forward_pre_hook(read)]

    def project(self, readout_RD: Tensor) -> Tensor:
        """See `SharedExperts.project`."""
        return readout_RD.to(self.down.weight.dtype) @ self.down.weight

    def output_bias(self, readout_RD: Tensor) -> Tensor | None:
        """See `SharedExperts.output_bias`."""
        return None if self.down.bias is None else readout_RD.float() @ self.down.bias.float()


class StackedSharedExperts:
    """Several experts whose weights are stacked, ``down_proj`` ``[n, D, I]``.

    Their activations are no module's input, so they are read where the module multiplies them with ``down_proj``.
    """

    def __init__(self, path: str, module: nn.Module, down_nDI: Tensor) -> None:
        self.path = path
        self.module = module
        self.down_nDI = down_nDI
        self.expert_width = down_nDI.shape[2]
        self.width = down_nDI.shape[0] * self.expert_width

    def watch(self, take: Callable[[Tensor], None]) -> list[RemovableHandle]:
        """See `SharedExperts.watch`."""

        def read(act_nTI: Tensor) -> None:
            take(act_nTI.transpose(0, 1).flatten(1))

        reader: Any = _ProductReader(self.down_nDI, read)

        def begin(module: nn.Module, args: Any) -> None:
            reader.__enter__()

        def end(module: nn.Module, args: Any, out: Any) -> None:
            reader.__exit__(None, None, None)

        return [
            self.module.register_forward_pre_hook(begin),
            self.module.register_forward_hook(end, always_call=True),  # after an exception, too
        ]

    def project(self, readout_RD: Tensor) -> Tensor:
        """See `SharedExperts.project`."""
        return torch.einsum("rd,ndi->rni", readout_RD.to(self.down_nDI.dtype), self.down_nDI).flatten(1)

    def output_bias(self, readout_RD: Tensor) -> Tensor | None:
        """See `SharedExperts.output_bias`."""
        return None


class _ProductReader(TorchFunctionMode):
    """Hands over the first factor of each product whose second is (a view of) the given weight."""

    def __init__(self, weight: Tensor, take: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.weight = weight
        self.take = take

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        is_product = func in (torch.bmm, torch.matmul, Tensor.bmm, Tensor.matmul, Tensor.__matmul__)
        if is_product and args[1].data_ptr() == self.weight.data_ptr():
            self.take(args[0])
        return func(*args, **(kwargs or {}))

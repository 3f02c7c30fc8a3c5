"""Down projections: where the activations of an expert are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mui_callback.errors import ProbeError, UnsupportedModelError
from mui_callback.experts.linear import widths


@dataclass(frozen=True, eq=False)
class Product:
    """One use of a down projection: ``out = act @ W_d``, recorded by autograd."""

    act: Tensor
    """Activations, ``[…, I]``; a leaf."""
    out: Tensor
    """``[…, D]``."""
    bias: Tensor | None
    """Output bias that `out` holds, ``[D]``."""
    expert: int = 0
    """Number of the expert in its down projection, or of the first of `n_experts` that are the first axis of `act`."""
    n_experts: int = 1


Take = Callable[[Product], Tensor]
"""Is handed each product, and returns what the model goes on with in place of its output."""


class DownProjection(Protocol):
    """The down projection of one expert or of several."""

    n_experts: int
    width: int
    """Neurons of each expert, I."""
    where: str

    def read(self, take: Take) -> AbstractContextManager[None]:
        """A context in which each product is handed to `take`."""


class LinearDown:
    """A linear module: its inputs are the activations.

    Args:
        where: module path, for messages.
        module: the down projection of one expert.
    """

    n_experts = 1

    def __init__(self, where: str, module: nn.Module) -> None:
        self.where = where
        self.module = module
        shape = widths(module)
        if shape is None:
            raise UnsupportedModelError(
                f"{where}: expected a linear map with in_features and out_features as down projection, "
                f"got {type(module).__name__}"
            )
        _check_present(where, getattr(module, "weight", None))
        self.width = shape[0]

    @contextmanager
    def read(self, take: Take) -> Iterator[None]:
        """See `DownProjection.read`."""
        pending: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
            torch.set_grad_enabled(True)
            first = None if args else next(iter(options))
            x = options[first] if first else args[0]
            # a copy, for a buffer of activations may be written to again
            pending.append(x.detach().clone().requires_grad_())
            return ((), {**options, first: pending[-1]}) if first else ((pending[-1], *args[1:]), options)

        def after(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            if not isinstance(out, Tensor) or not out.requires_grad:
                raise ProbeError(
                    f"{self.where}: expected a down projection that autograd can follow, got {type(out).__name__}. "
                    "Does it run under torch.no_grad or torch.inference_mode?"
                )
            return take(Product(pending.pop(), out, getattr(module, "bias", None)))

        on_call = self.module.register_forward_pre_hook(before, with_kwargs=True)
        with on_call, self.module.register_forward_hook(after):
            yield


class StackedDown:
    """A parameter that holds the down projections of several experts one after the other.

    Its products are no modules, so they are read where `owner` multiplies activations with (a part of) it.

    Args:
        where: path of the parameter or its owner, for messages.
        owner: the module in whose forward the products are made.
        weight: ``[E, …, …]``, or ``[E · I, D]``.
        n_experts: E.
        width: I.
    """

    def __init__(self, where: str, owner: nn.Module, weight: Tensor, n_experts: int, width: int) -> None:
        self.where = where
        self.owner = owner
        self.weight = weight
        self.n_experts = n_experts
        self.width = width
        _check_present(where, weight)

    @contextmanager
    def read(self, take: Take) -> Iterator[None]:
        """See `DownProjection.read`."""
        with ExitStack() as readers:  # of a forward that was interrupted, too

            def before(module: nn.Module, args: Any) -> None:
                readers.enter_context(_ProductReader(self, take))

            def after(module: nn.Module, args: Any, out: Any) -> None:
                readers.pop_all().close()

            on_call = self.owner.register_forward_pre_hook(before)
            with on_call, self.owner.register_forward_hook(after):
                yield

    def experts_of(self, weight: object) -> tuple[int, int] | None:
        """First expert and number of experts of a part of the weight; None for another tensor."""
        whole = self.weight
        if not isinstance(weight, Tensor) or weight.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
            return None
        per_expert = whole.numel() // self.n_experts
        first, rest = divmod(int(weight.storage_offset() - whole.storage_offset()), per_expert)
        n_experts, beyond = divmod(weight.numel(), per_expert)
        is_part = first >= 0 and rest == 0 and beyond == 0 and 0 < first + n_experts <= self.n_experts
        return (first, n_experts) if is_part else None


_PRODUCTS = (F.linear, torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__)


class _ProductReader(TorchFunctionMode):
    """Hands over each product whose second factor is (a view of) the given weight."""

    def __init__(self, down: StackedDown, take: Take) -> None:
        super().__init__()
        self.down = down
        self.take = take

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        experts = self.down.experts_of(args[1]) if func in _PRODUCTS and len(args) > 1 else None
        if experts is None:
            return func(*args, **(kwargs or {}))
        if args[0].shape[-1] != self.down.width or (experts[1] > 1 and args[0].shape[0] != experts[1]):
            raise ProbeError(
                f"{self.down.where}: expected products of one expert at a time, [..., {self.down.width}], or of all "
                f"of them side by side, [{self.down.n_experts}, ..., {self.down.width}], got activations of shape "
                f"{tuple(args[0].shape)}."
            )
        act = args[0].detach().requires_grad_()
        with torch.enable_grad():
            out = func(act, *args[1:], **(kwargs or {}))
        bias = args[2] if func is F.linear and len(args) > 2 else (kwargs or {}).get("bias")
        return self.take(Product(act, out, bias, *experts))


def _check_present(where: str, weight: object) -> None:
    if weight is None:
        return
    if isinstance(weight, Tensor) and (weight.numel() == 0 or type(weight.data).__name__ == "DTensor"):
        raise UnsupportedModelError(
            f"{where}: expected a weight that is whole in this process, got {type(weight.data).__name__} of shape "
            f"{tuple(weight.shape)}. Experts that are sharded over processes cannot be probed."
        )

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
from mui_callback.parallel.weights import check_readable


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
    expert_S: Tensor | None = None
    """Number of the expert of each row in its down projection, int64, where the rows are of several experts."""


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
        check_readable(where, getattr(module, "weight", None))
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
        self._weight = weight
        self._name = next((name for name, own in owner.named_parameters() if own is weight), None)
        self.n_experts = n_experts
        self.width = width
        check_readable(where, weight)

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

    @property
    def weight(self) -> Tensor:
        """The parameter as it is now: whatever spreads weights over processes puts another in its place."""
        return self._weight if self._name is None else self.owner.get_parameter(self._name)

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
_GROUPED = tuple(
    product for product in (getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None)) if product is not None
)
"""Products of rows that are sorted by expert, each with the weight of its own."""


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
        is_grouped = func in _GROUPED
        is_product = (is_grouped or func in _PRODUCTS) and len(args) > 1
        experts = self.down.experts_of(args[1]) if is_product else None
        if experts is None:
            return func(*args, **(kwargs or {}))
        if is_grouped:
            return self._grouped(func, args, kwargs or {})
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

    def _grouped(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        ends = kwargs["offs"] if "offs" in kwargs else args[2]
        act = args[0].detach().requires_grad_()
        with torch.enable_grad():
            out = func(act, *args[1:], **kwargs)
        rows = torch.arange(len(act), device=act.device, dtype=ends.dtype)
        # rows behind the last end are of nobody
        expert_S = torch.searchsorted(ends, rows, right=True).clamp(max=self.down.n_experts - 1)
        return self.take(Product(act, out, None, expert_S=expert_S))

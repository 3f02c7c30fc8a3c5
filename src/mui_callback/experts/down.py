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
from mui_callback.experts.grouped import group_ends, grouped_mm
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
    weight: Tensor | None = None
    """``[D, I]``, where `out` is nothing but ``act @ weight.T`` and a bias; ``[E, D, I]`` where the rows are of several
    experts, those of the first one first."""

    def projected(self, readout_PD: Tensor, place_P: Tensor) -> Tensor:
        """⟨W_d[:, j], readout⟩ for some of the rows, ``[P, I]``.

        Args:
            readout_PD: readout of each row.
            place_P: which rows, ascending.
        """
        if self.weight is not None:
            if self.expert_S is None:
                return readout_PD.to(self.weight.dtype) @ self.weight
            return grouped_mm(readout_PD, self.weight, group_ends(self.expert_S[place_P], len(self.weight)))
        readout_SD = self.out.new_zeros(self.out.numel() // self.out.shape[-1], self.out.shape[-1])
        readout_SD[place_P] = readout_PD.to(readout_SD.dtype)
        (grad,) = torch.autograd.grad(self.out, self.act, readout_SD.view_as(self.out), retain_graph=True)
        return grad.reshape(-1, grad.shape[-1])[place_P]


Take = Callable[[Product], Tensor]
"""Is handed each product, and returns what the model goes on with in place of its output."""
IsRecorded = Callable[[], bool]
"""Whether autograd is to record the next product; if not, its activations may be overwritten after it was taken."""


class DownProjection(Protocol):
    """The down projection of one expert or of several."""

    n_experts: int
    width: int
    """Neurons of each expert, I."""
    where: str

    def read(self, take: Take, is_recorded: IsRecorded) -> AbstractContextManager[None]:
        """A context in which each product is handed to `take`."""

    def masked(self, is_masked_EI: Tensor, note_use: Callable[[], None]) -> AbstractContextManager[None]:
        """A context in which the activations of some neurons are zero.

        Args:
            is_masked_EI: which, bool ``[E, I]`` for its E experts.
            note_use: called at each product.
        """


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
    def read(self, take: Take, is_recorded: IsRecorded) -> Iterator[None]:
        """See `DownProjection.read`."""
        pending: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
            if not is_recorded():
                pending.append(_input(args, options))
                return None
            torch.set_grad_enabled(True)
            # a copy, for a buffer of activations may be written to again
            pending.append(_input(args, options).detach().clone().requires_grad_())
            return _with_input(args, options, pending[-1])

        def after(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            act = pending.pop()
            if act.requires_grad and (not isinstance(out, Tensor) or not out.requires_grad):
                raise ProbeError(
                    f"{self.where}: expected a down projection that autograd can follow, got {type(out).__name__}. "
                    "Does it run under torch.no_grad or torch.inference_mode?"
                )
            return take(Product(act, out, getattr(module, "bias", None), weight=_plain_weight(module, out)))

        on_call = self.module.register_forward_pre_hook(before, with_kwargs=True)
        with on_call, self.module.register_forward_hook(after):
            yield

    @contextmanager
    def masked(self, is_masked_EI: Tensor, note_use: Callable[[], None]) -> Iterator[None]:
        """See `DownProjection.masked`."""

        def before(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
            note_use()
            return _with_input(args, options, _input(args, options).masked_fill(is_masked_EI[0], 0))

        with self.module.register_forward_pre_hook(before, with_kwargs=True):
            yield


def _plain_weight(module: nn.Module, out: Tensor) -> Tensor | None:
    """The weight of a linear module, if its output is made of nothing else."""
    weight = _plain(module.weight) if type(module) is nn.Linear else None
    return weight if weight is not None and weight.shape == (out.shape[-1], module.in_features) else None


def _plain(weight: Tensor) -> Tensor | None:
    """The weight, if a product with it is nothing else than that."""
    weight = weight.detach()
    return weight if type(weight) is Tensor and not torch.is_autocast_enabled(weight.device.type) else None


def _input(args: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """The first argument of a module, by position or by name."""
    x: Tensor = args[0] if args else next(iter(options.values()))
    return x


def _with_input(args: tuple[Any, ...], options: dict[str, Any], x: Tensor) -> tuple[Any, dict[str, Any]]:
    """The arguments of a module with another first one."""
    return ((x, *args[1:]), options) if args else ((), {**options, next(iter(options)): x})


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

    def read(self, take: Take, is_recorded: IsRecorded) -> AbstractContextManager[None]:
        """See `DownProjection.read`."""

        def taken(use: _Use) -> Tensor:
            is_leaf = is_recorded()
            act = use.act.detach().requires_grad_(is_leaf)
            with torch.set_grad_enabled(is_leaf):
                out = use.multiply(act)
            return take(Product(act, out, use.bias, use.expert, use.n_experts, use.expert_S, use.weight))

        return self._each_use(taken)

    def masked(self, is_masked_EI: Tensor, note_use: Callable[[], None]) -> AbstractContextManager[None]:
        """See `DownProjection.masked`."""

        def without_masked(use: _Use) -> Tensor:
            note_use()
            return use.multiply(use.act.masked_fill(use.of_neurons(is_masked_EI), 0))

        return self._each_use(without_masked)

    @contextmanager
    def _each_use(self, make: Callable[[_Use], Tensor]) -> Iterator[None]:
        with ExitStack() as modes:  # of a forward that was interrupted, too

            def before(module: nn.Module, args: Any) -> None:
                modes.enter_context(_ProductMode(self, make))

            def after(module: nn.Module, args: Any, out: Any) -> None:
                modes.pop_all().close()

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


@dataclass(frozen=True, eq=False)
class _Use:
    """A product of activations with (a part of) a stacked weight that the model is about to make; see `Product`."""

    act: Tensor
    multiply: Callable[[Tensor], Tensor]
    """What it would do with the activations."""
    bias: Tensor | None = None
    expert: int = 0
    n_experts: int = 1
    expert_S: Tensor | None = None
    weight: Tensor | None = None

    def of_neurons(self, value_EI: Tensor) -> Tensor:
        """What belongs to the neuron of each activation; broadcasts with the activations."""
        if self.expert_S is not None:
            return value_EI[self.expert_S]
        if self.n_experts == 1:
            return value_EI[self.expert]
        return value_EI[self.expert :][: self.n_experts].view(self.n_experts, *[1] * (self.act.dim() - 2), -1)


class _ProductMode(TorchFunctionMode):
    """Lets `make` make each product whose second factor is (a view of) the given weight."""

    def __init__(self, down: StackedDown, make: Callable[[_Use], Tensor]) -> None:
        super().__init__()
        self.down = down
        self.make = make

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = kwargs or {}
        is_grouped = func in _GROUPED
        is_product = (is_grouped or func in _PRODUCTS) and len(args) > 1
        experts = self.down.experts_of(args[1]) if is_product else None
        if experts is None:
            return func(*args, **options)

        def multiply(act: Tensor) -> Tensor:
            out: Tensor = func(act, *args[1:], **options)
            return out

        if is_grouped:
            ends = options["offs"] if "offs" in options else args[2]
            weight = args[1].detach().transpose(-2, -1) if type(args[1].detach()) is Tensor else None
            return self.make(_Use(args[0], multiply, expert_S=self._expert_of_rows(args[0], ends), weight=weight))
        if args[0].shape[-1] != self.down.width or (experts[1] > 1 and args[0].shape[0] != experts[1]):
            raise ProbeError(
                f"{self.down.where}: expected products of one expert at a time, [..., {self.down.width}], or of all "
                f"of them side by side, [{self.down.n_experts}, ..., {self.down.width}], got activations of shape "
                f"{tuple(args[0].shape)}."
            )
        bias = args[2] if func is F.linear and len(args) > 2 else options.get("bias")
        weight = _plain(args[1]) if experts[1] == 1 and args[1].dim() == 2 else None
        if weight is not None and func is not F.linear:
            weight = weight.mT
        return self.make(_Use(args[0], multiply, bias, *experts, weight=weight))

    def _expert_of_rows(self, act: Tensor, ends: Tensor) -> Tensor:
        rows = torch.arange(len(act), device=act.device, dtype=ends.dtype)
        # rows behind the last end are of nobody
        return torch.searchsorted(ends, rows, right=True).clamp(max=self.down.n_experts - 1)

"""Telling the probe about a MoE block whose structure does not tell.

    from mui_callback import MoEBlock, register_adapter

    @register_adapter
    def my_block(module):
        if isinstance(module, MyMoE):
            return MoEBlock(routed=[expert.out for expert in module.experts], shared=[module.common.out])

The down projection of each expert is all that has to be known: its input are the activations, and what becomes of its
output is followed by autograd to the output of the block. Weights of several experts in one parameter are named by a
`StackedWeight`. Whether it was told right is checked as for every model: the contributions of all neurons have to add
up to the output of the block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mui_callback.errors import UnsupportedModelError
from mui_callback.experts.called import CalledExperts
from mui_callback.experts.down import DownProjection, LinearDown, StackedDown
from mui_callback.experts.expert_parallelism import Spread
from mui_callback.parallel.weights import whole_shape


@dataclass(frozen=True)
class StackedWeight:
    """Down projections of several experts in one parameter, ``[E, …, …]`` or ``[E · I, D]``."""

    owner: nn.Module
    """The module in whose forward activations are multiplied with (parts of) the parameter."""
    weight: Tensor
    n_experts: int
    """E."""
    width: int
    """Neurons of each expert, I."""


@dataclass(frozen=True)
class MoEBlock:
    """The experts of a block."""

    routed: Sequence[nn.Module] | StackedWeight
    """Down projection of each routed expert, in order: linear modules with ``in_features`` and ``out_features``."""
    shared: Sequence[nn.Module | StackedWeight] = ()
    """Down projections of the shared experts."""
    identities: Sequence[nn.Module] = ()
    """Modules that stand for experts without neurons: what passes through them is part of the block's output."""


Adapter = Callable[[nn.Module], MoEBlock | None]
"""Is asked about each module of a model: the experts of a MoE block, None for any other module."""

_adapters: list[Adapter] = []


def register_adapter(adapter: Adapter) -> Adapter:
    """Ask `adapter` about modules before their structure is looked at; the last one that was registered comes first.

    May be used as a decorator. Returns the adapter.
    """
    _adapters.insert(0, adapter)
    return adapter


def unregister_adapter(adapter: Adapter) -> None:
    """Undo `register_adapter`."""
    _adapters.remove(adapter)


def adapted(path: str, module: nn.Module, spread: Spread) -> tuple[CalledExperts, tuple[CalledExperts, ...]] | None:
    """Routed and shared experts of a module, if one of the adapters knows it.

    Raises:
        UnsupportedModelError: an adapter returned something that is not a `MoEBlock` with linear maps in `module`.
    """
    for adapter in _adapters:
        block = adapter(module)
        if block is None:
            continue
        name = getattr(adapter, "__name__", repr(adapter))
        if not isinstance(block, MoEBlock):
            raise UnsupportedModelError(f"{path}: expected a MoEBlock or None from adapter {name}, got {block!r}")
        paths = {inner: f"{path}.{name}".rstrip(".") for name, inner in module.named_modules()}
        routed = [block.routed] if isinstance(block.routed, StackedWeight) else list(block.routed)
        if not routed:
            raise UnsupportedModelError(f"{path}: adapter {name} names no routed experts")
        downs = [_down(path, paths, part) for part in routed]
        experts = CalledExperts(
            path, downs, _modules(routed), is_routed=True, identities=block.identities, spread=spread
        )
        shared = tuple(
            CalledExperts(path, [_down(path, paths, part)], _modules([part]), is_routed=False, width=experts.width)
            for part in block.shared
        )
        return experts, shared
    return None


def _modules(parts: Sequence[nn.Module | StackedWeight]) -> list[nn.Module]:
    return [part.owner if isinstance(part, StackedWeight) else part for part in parts]


def _down(path: str, paths: dict[nn.Module, str], part: nn.Module | StackedWeight) -> DownProjection:
    module = part.owner if isinstance(part, StackedWeight) else part
    if module not in paths:
        raise UnsupportedModelError(f"{path}: expected down projections that are in this module, got {module!r}")
    if isinstance(part, StackedWeight):
        return StackedDown(paths[module], part.owner, part.weight, part.n_experts, part.width)
    return LinearDown(paths[module], part)


@register_adapter
def dbrx(module: nn.Module) -> MoEBlock | None:
    """DBRX: the rows of all experts in one matrix ``[E · I, D]``, handed to one MLP module in parts."""
    mlp = getattr(getattr(module, "experts", None), "mlp", None)
    weight, n_experts = getattr(mlp, "w2", None), getattr(mlp, "moe_num_experts", None)
    if not isinstance(mlp, nn.Module) or not isinstance(weight, Tensor) or not isinstance(n_experts, int):
        return None
    return MoEBlock(StackedWeight(mlp, weight, n_experts, whole_shape(weight)[0] // n_experts))

"""Routed experts as a list of equal modules, and in parameters that are stacked outside of transformers' interface."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mui_callback.errors import UnsupportedModelError
from mui_callback.experts.called import CalledExperts
from mui_callback.experts.down import LinearDown, StackedDown
from mui_callback.experts.expert_parallelism import Spread
from mui_callback.experts.linear import down_projection
from mui_callback.parallel.weights import whole_shape


def find_list(path: str, module: nn.Module, spread: Spread) -> CalledExperts | None:
    """The experts of a module that is a list (or dict) of two or more MLPs; None if it is not.

    Members without parameters are experts that pass tokens on, or no experts at all. The others are as many in each
    process, if they are spread.

    Raises:
        UnsupportedModelError: the down projection of the MLPs cannot be told, or is not there, or their widths differ.
    """
    if not isinstance(module, nn.ModuleList | nn.ModuleDict):
        return None
    members = {name: child for name, child in module.named_children() if any(True for _ in child.parameters())}
    if len(members) * spread.peers.n < 2:
        return None
    downs = []
    for name, member in members.items():
        down = down_projection(f"{path}.{name}", member)
        if down is None:
            return None
        downs.append(LinearDown(f"{path}.{name}", down))
    return CalledExperts(
        path, downs, list(members.values()), is_routed=True, identities=_identities(module), spread=spread
    )


def find_stacked_parameter(path: str, module: nn.Module, spread: Spread) -> CalledExperts | None:
    """Experts whose down projections are one parameter ``[E, …, …]`` beside one that they read through.

    ``down_proj`` with ``gate_up_proj`` or ``up_proj`` in one module (Llama 4, LongCat), ``w2`` with ``w1`` (DeepSpeed
    AutoEP), or the ``weight`` of ``output_linear`` with that of ``input_linear`` (parallel experts).
    """
    for name, owner, down, up in _stacks(module):
        if (
            not isinstance(down, Tensor)
            or not isinstance(up, Tensor)
            or {len(whole_shape(w)) for w in (down, up)} != {3}
        ):
            continue
        where = f"{path}.{name}"
        # as `nn.Linear` has them, where they are named after the formula: [E, D, I]
        width = whole_shape(down)[2] if name == "w2" else _width(where, whole_shape(down), whole_shape(up))
        stack = StackedDown(where, owner, down, whole_shape(down)[0], width)
        return CalledExperts(path, [stack], [owner], is_routed=True, identities=_identities(module), spread=spread)
    return None


def _identities(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.children() if isinstance(child, nn.Identity)]


def _width(where: str, down: torch.Size, up: torch.Size) -> int:
    """I, where the two have the shapes [D, I] and [D, I] or [D, 2·I] one way or the other."""
    one, other = down[1:]
    fits = [n for n, n_in in ((one, other), (other, one)) if sorted(up[1:]) == sorted((n_in, 2 * n))]
    if one == other or len(fits) == 1:
        return fits[0] if fits else one
    raise UnsupportedModelError(
        f"{where}: which of the two axes of {tuple(down)} are the neurons cannot be told from the other weight, "
        f"{tuple(up)}. `register_adapter` can say it."
    )


def _stacks(module: nn.Module) -> Iterator[tuple[str, nn.Module, object, object]]:
    own = dict(module.named_parameters(recurse=False))
    yield "down_proj", module, own.get("down_proj"), own.get("gate_up_proj", own.get("up_proj"))
    yield "w2", module, own.get("w2"), own.get("w1")
    down, up = getattr(module, "output_linear", None), getattr(module, "input_linear", None)
    if isinstance(down, nn.Module):
        yield "output_linear.weight", down, getattr(down, "weight", None), getattr(up, "weight", None)


def has_router(block: nn.Module, n_experts: int, *, beside: nn.Module | None = None) -> bool:
    """Whether a block holds, beside its experts and other lists, a weight with one row or column for each expert.

    Routers that are named so may have a few more, for experts without neurons.
    """
    lists = [child for child in block.modules() if isinstance(child, nn.ModuleList | nn.ModuleDict)]
    elsewhere = {id(parameter) for part in (*lists, beside) if part is not None for parameter in part.parameters()}
    for name, parameter in block.named_parameters():
        shape = whole_shape(parameter)
        if len(shape) == 2 and id(parameter) not in elsewhere:
            is_named = any(word in name.lower() for word in ("router", "gate.", "gating", "switch"))
            if n_experts in shape or (is_named and n_experts < min(shape) <= 2 * n_experts):
                return True
    return False

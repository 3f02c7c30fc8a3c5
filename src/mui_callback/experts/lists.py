"""Routed experts as a list of equal modules, and in parameters that are stacked outside of transformers' interface."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from mui_callback.errors import UnsupportedModelError
from mui_callback.experts.called import CalledExperts
from mui_callback.experts.down import LinearDown, StackedDown
from mui_callback.experts.linear import down_projection


def find_list(path: str, module: nn.Module) -> CalledExperts | None:
    """The experts of a module that is a list (or dict) of two or more MLPs; None if it is not.

    Members without parameters are experts that pass tokens on, or no experts at all.

    Raises:
        UnsupportedModelError: the down projection of the MLPs cannot be told, or is not there, or their widths differ.
    """
    if not isinstance(module, nn.ModuleList | nn.ModuleDict):
        return None
    members = {name: child for name, child in module.named_children() if any(True for _ in child.parameters())}
    if len(members) < 2:
        return None
    downs = []
    for name, member in members.items():
        down = down_projection(f"{path}.{name}", member)
        if down is None:
            return None
        downs.append(LinearDown(f"{path}.{name}", down))
    return CalledExperts(path, downs, list(members.values()), is_routed=True, identities=_identities(module))


def find_stacked_parameter(path: str, module: nn.Module) -> CalledExperts | None:
    """Experts whose down projections are one parameter ``[E, …, …]`` beside one that they read through.

    ``down_proj`` with ``gate_up_proj`` or ``up_proj`` in one module (Llama 4, LongCat), or the ``weight`` of
    ``output_linear`` with that of ``input_linear`` (parallel experts).
    """
    for name, owner, down, up in _stacks(module):
        if not isinstance(down, Tensor) or not isinstance(up, Tensor) or down.dim() != 3 or up.dim() != 3:
            continue
        where = f"{path}.{name}"
        stack = StackedDown(where, owner, down, down.shape[0], _width(where, down, up))
        return CalledExperts(path, [stack], [owner], is_routed=True, identities=_identities(module))
    return None


def _identities(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.children() if isinstance(child, nn.Identity)]


def _width(where: str, down: Tensor, up: Tensor) -> int:
    """I, where the two have the shapes [D, I] and [D, I] or [D, 2·I] one way or the other."""
    one, other = down.shape[1:]
    fits = [n for n, n_in in ((one, other), (other, one)) if sorted(up.shape[1:]) == sorted((n_in, 2 * n))]
    if one == other or len(fits) == 1:
        return fits[0] if fits else one
    raise UnsupportedModelError(
        f"{where}: which of the two axes of {tuple(down.shape)} are the neurons cannot be told from the other weight, "
        f"{tuple(up.shape)}. `register_adapter` can say it."
    )


def _stacks(module: nn.Module) -> Iterator[tuple[str, nn.Module, object, object]]:
    own = dict(module.named_parameters(recurse=False))
    yield "down_proj", module, own.get("down_proj"), own.get("gate_up_proj", own.get("up_proj"))
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
        if parameter.dim() == 2 and id(parameter) not in elsewhere:
            is_named = any(word in name.lower() for word in ("router", "gate.", "gating", "switch"))
            if n_experts in parameter.shape or (is_named and n_experts < min(parameter.shape) <= 2 * n_experts):
                return True
    return False

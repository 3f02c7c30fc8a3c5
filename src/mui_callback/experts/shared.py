"""Shared experts: MLPs beside the routed experts that every token passes through."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from mui_callback.errors import UnsupportedModelError
from mui_callback.experts.called import CalledExperts
from mui_callback.experts.down import DownProjection, LinearDown, StackedDown
from mui_callback.experts.linear import down_projection, linear_maps
from mui_callback.experts.paths import is_attention
from mui_callback.parallel.weights import whole_shape

SHARED_NAMES = ("shared_expert", "shared_experts", "shared_mlp")
"""Names under which models keep their shared experts."""


def has_shared(block: nn.Module) -> bool:
    """Whether the module holds something that is named as shared experts are."""
    return any(isinstance(getattr(block, name, None), nn.Module) for name in SHARED_NAMES)


def find_shared_experts(path: str, block: nn.Module, routed: nn.Module, routed_width: int) -> tuple[CalledExperts, ...]:
    """The shared experts among the children of `block`: those named so, and every MLP beside the routed experts.

    One MLP counts as several experts of the routed width where that divides its own, else as one expert.

    Args:
        path: module path of the block.
        block: the module that holds the experts.
        routed: the module of the routed experts, which is left out with all that it holds.
        routed_width: neurons of a routed expert.

    Raises:
        UnsupportedModelError: there are shared experts, but what they write through cannot be told.
    """
    found = []
    for child_path, child, is_named in _candidates(path, block):
        inside = set(child.modules())
        if routed in inside or child in set(routed.modules()):
            continue
        down = _down_of(child_path, child, is_named=is_named)
        if down is not None:
            found.append(CalledExperts(child_path, [down], [child], is_routed=False, width=routed_width))
    return tuple(found)


def _candidates(path: str, block: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    for name, child in block.named_children():
        if is_attention(name):
            continue
        is_named = name in SHARED_NAMES
        child = getattr(child, "_orig_mod", child)  # compiled by itself
        if isinstance(child, nn.ModuleList):
            for index, part in enumerate(child):
                yield f"{path}.{name}.{index}", part, is_named
        else:
            yield f"{path}.{name}", child, is_named


def _down_of(path: str, module: nn.Module, *, is_named: bool) -> DownProjection | None:
    stacked = getattr(module, "down_proj", None)
    if is_named and isinstance(stacked, Tensor) and len(whole_shape(stacked)) == 3:
        n_experts, _, width = whole_shape(stacked)
        return StackedDown(f"{path}.down_proj", module, stacked, n_experts, width)
    down = down_projection(path, module)
    if down is not None:
        return LinearDown(path, down)
    if not is_named:
        return None
    raise UnsupportedModelError(
        f"{path}: expected shared experts with linear maps to their neurons and back, or with a parameter down_proj "
        f"[experts, width, neurons]; found {', '.join(linear_maps(module)) or 'no linear map'} in "
        f"{type(module).__name__}. `register_adapter` can name their down projection."
    )

"""Whether experts' outputs are part of the output of their layer as they are."""

from __future__ import annotations

from typing import Any

from torch import Tensor

_RESHAPING = (
    *("AliasBackward0", "CloneBackward0", "ReshapeAliasBackward0", "SqueezeBackward0", "SqueezeBackward1"),
    *("ToCopyBackward0", "UnsafeViewBackward0", "UnsqueezeBackward0", "ViewBackward0"),
)
"""Operations of autograd after which the same elements are there in the same order."""


def leads_straight(leaf: Tensor, out: Tensor) -> bool:
    """Whether a tensor is a leaf of autograd in another shape, plus what does not depend on the leaf.

    That is told by the operations that autograd recorded, whatever the values are. Transposed, such a tail hands on
    what it is sent.
    """
    return out.numel() == leaf.numel() and _arrivals(out.grad_fn, leaf) == 1


def _arrivals(node: Any, leaf: Tensor) -> float:
    """On how many ways the leaf comes to an operation as it is; not a number if on any other."""
    if node is None:
        return 0
    if getattr(node, "variable", None) is leaf:
        return 1
    ways = [_arrivals(before, leaf) for before, _ in node.next_functions]
    if not any(ways):
        return 0
    name = node.name()
    is_sum = name == "AddBackward0" and (not ways[-1] or node._saved_alpha == 1)
    return sum(ways) if is_sum or name in _RESHAPING else float("nan")

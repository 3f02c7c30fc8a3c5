"""Whether experts' outputs are part of the output of their layer as they are."""

from __future__ import annotations

from collections.abc import Iterable
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
    if out.numel() != leaf.numel():
        return False
    n_arrivals = 0
    seen: set[Any] = set()
    others: list[Any] = []  # from where the leaf would come changed, or a second time
    stack: list[Any] = [out.grad_fn]
    while stack:
        node = stack.pop()
        if getattr(node, "variable", None) is leaf:
            n_arrivals += 1
        elif node is None:
            continue
        elif node in seen or not _hands_on(node):
            others.append(node)
        else:
            seen.add(node)
            stack += [before for before, _ in node.next_functions]
    return n_arrivals == 1 and not _is_behind(leaf, others)


def _hands_on(node: Any) -> bool:
    """Whether an operation gives on each of its inputs as it is, added to the others."""
    return node.name() in _RESHAPING or (node.name() == "AddBackward0" and node._saved_alpha == 1)


def _is_behind(leaf: Tensor, nodes: Iterable[Any]) -> bool:
    """Whether any of some operations depends on a leaf."""
    seen: set[Any] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if getattr(node, "variable", None) is leaf:
            return True
        seen.add(node)
        stack += [before for before, _ in node.next_functions]
    return False

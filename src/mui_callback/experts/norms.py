"""Norms: what passes for one, and what it is when seen from in front of it."""

from __future__ import annotations

from torch import Tensor, nn

from mui_callback.parallel.weights import whole_shape


def channel_scale(out: Tensor, x: Tensor) -> Tensor:
    """What a norm scaled each channel of its input by, float32 in the shape of both.

    So ⟨norm(x), r⟩ = ⟨x, scale · r⟩ holds exactly. A channel that is zero adds nothing on either side.

    Args:
        out: output of the norm.
        x: its input.
    """
    return (out.float() / x.float()).masked_fill_(x == 0, 0)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm: named so, and without a matrix."""
    if "norm" not in type(module).__name__.lower():
        return False
    return all(len(whole_shape(parameter)) <= 1 for parameter in module.parameters())

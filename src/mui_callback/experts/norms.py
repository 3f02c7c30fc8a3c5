"""A norm behind an expert, seen from in front of it."""

from __future__ import annotations

from torch import Tensor


def channel_scale(out: Tensor, x: Tensor) -> Tensor:
    """What a norm scaled each channel of its input by, float32 in the shape of both.

    So ⟨norm(x), r⟩ = ⟨x, scale · r⟩ holds exactly. A channel that is zero adds nothing on either side.

    Args:
        out: output of the norm.
        x: its input.
    """
    return (out.float() / x.float()).masked_fill_(x == 0, 0)

"""Calls of down projections that autograd records.

Shapes: S rows of a call (one token in one expert, or none), W = neurons of one down projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mui_callback.errors import ProbeError
from mui_callback.experts.cut import Cut
from mui_callback.experts.down import Product
from mui_callback.settings import Activation


@dataclass(eq=False)
class Call:
    """One product, and where the tail begins behind it."""

    product: Product
    cut: Cut
    first_expert: int
    gate: Tensor | None = None
    """Activations without the up factor, where they are read."""

    @property
    def expert_S(self) -> Tensor:
        """Number of the down projection of each row in the layer, int64 ``[S]``."""
        if self.product.expert_S is not None:
            return self.first_expert + self.product.expert_S
        experts = torch.arange(
            self.first_expert, self.first_expert + self.product.n_experts, device=self.cut.value.device
        )
        return experts.repeat_interleave(self.cut.n_rows // self.product.n_experts)


def activations(product: Product, gate: Tensor | None, activation: Activation) -> Tensor:
    """Those that feed a down projection, or what they are without the up factor, ``[S, W]``.

    Raises:
        ProbeError: what they are without it was not seen.
    """
    act = product.act
    if activation == "gate":
        if gate is None or gate.shape != act.shape:
            raise ProbeError(
                "activation='gate': expected one output of the activation function of shape "
                f"{tuple(act.shape)} before each down projection, got {'none' if gate is None else tuple(gate.shape)}"
            )
        act = gate
    return act.detach().reshape(-1, act.shape[-1])

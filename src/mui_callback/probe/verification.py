"""Whether a model is read right: what a batch says about the conservation identity of each layer and about the head."""

from __future__ import annotations

from dataclasses import dataclass

from mui_callback.counts import ProbeCounts
from mui_callback.errors import ProbeError
from mui_callback.layout import ExpertLayout, LayerShape

ROUNDING = 0.05
"""Relative error of the identity that rounding can explain, in 16 bits too; a wrong tensor is far above it."""
ROUNDING_OF_FLOAT32 = 2e-3
"""The same for a forward pass in 32 bits or more, by tensor cores that round factors to 10 bits."""


@dataclass(frozen=True)
class LayerCheck:
    """How well the identity holds in one layer."""

    layer: LayerShape
    error: float
    """‖Σ f - (output - unmade)‖ / ‖output - unmade‖; NaN if the layer put nothing out."""
    experts_per_token: float
    """Routed experts that a response token was sent to, on average."""


@dataclass(frozen=True)
class Verification:
    """What a batch of tokens said."""

    layers: tuple[LayerCheck, ...]
    head_error: float
    """How far the targets' logits are from what W_head makes of the hidden states; -1 if the head ran as no module."""
    n_tokens: int
    """Response tokens that were scored."""
    rounding: float = ROUNDING
    """Relative error that is accepted."""

    @classmethod
    def of(cls, layout: ExpertLayout, counts: ProbeCounts, n_tokens: int, rounding: float = ROUNDING) -> Verification:
        """From the counts of a pass over `n_tokens` response tokens."""
        routed = counts.routed.sum(0)
        layers = []
        for index, shape in enumerate(layout.layers):
            uses = routed[(layout.layer_of_expert == index) & ~layout.is_shared].sum()
            layers.append(LayerCheck(shape, float(counts.identity_error[index]), float(uses / max(n_tokens, 1))))
        return cls(tuple(layers), float(counts.head_error[0]), n_tokens, rounding)

    def is_wrong(self, check: LayerCheck) -> bool:
        """Whether a layer is read wrong."""
        return check.error > self.rounding

    @property
    def complaints(self) -> list[str]:
        """What is wrong, one sentence for each layer, and for the head."""
        found = [
            f"layer {check.layer.layer} ({check.layer.path}): the contributions of its neurons do not add up to its "
            f"output (relative error {check.error:.2g}, at most {self.rounding:g} can be rounding). Its experts work "
            "in a way that is not read right, so no number is reported."
            for check in self.layers
            if self.is_wrong(check)
        ]
        if self.n_tokens and self.head_error < 0:
            found.append(
                "the language-model head was not called as a module on the hidden states, so that its weight is what "
                "the logits are made with could not be checked."
            )
        elif self.head_error > self.rounding:
            found.append(
                "the logits of the language-model head are not its weight times the hidden states (relative error "
                f"{self.head_error:.2g}, at most {self.rounding:g} can be rounding). Is there an adapter on it?"
            )
        return found

    def raise_if_wrong(self) -> None:
        """Raises `ProbeError` with the first complaint."""
        if self.complaints:
            raise ProbeError(self.complaints[0])

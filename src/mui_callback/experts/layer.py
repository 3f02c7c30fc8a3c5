"""A MoE layer as it was found: its experts, and the module at whose end all of them have run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from mui_callback.experts.base import Experts
from mui_callback.layout import ExpertLayout, LayerShape
from mui_callback.parallel.peers import Peers


@dataclass(frozen=True)
class ExpertLayer:
    """One MoE layer, or the MLP of a dense layer as one expert."""

    shape: LayerShape
    experts: tuple[Experts, ...]
    """The routed experts, then the shared ones."""
    scope: nn.Module
    """The module whose forward calls all experts of the layer."""
    scope_is_moe: bool
    """Whether the output of `scope` is the output of the MoE layer. If not, `scope` is a decoder layer: its MoE layer
    ends where the outputs of all experts have come together and another module takes them, or with the decoder layer,
    whose output holds more than that of the experts."""

    @property
    def peers(self) -> Peers:
        """The processes that its routed experts are spread over."""
        return self.experts[0].spread.peers

    @property
    def layout(self) -> str:
        """How the weights of its experts are kept, in words."""
        return ", ".join(dict.fromkeys(experts.layout for experts in self.experts))


def layout_of(layers: Sequence[ExpertLayer]) -> ExpertLayout:
    """The numbering of the layers' experts and neurons."""
    return ExpertLayout([layer.shape for layer in layers])

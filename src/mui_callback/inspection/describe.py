"""What can be said about the expert layers of a model from its modules alone, without weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mui_callback.experts.layer import ExpertLayer
from mui_callback.layout import LayerShape
from mui_callback.probe.model_config import text_config
from mui_callback.rules import Rule

_IN_CONFIGS = ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts", "moe_k", "num_selected_experts")
"""Names under which routers, blocks and configs keep the number of experts of a token."""
_IN_MODULES = (*_IN_CONFIGS, "top_k", "k")
"""In a config, ``top_k`` is about the sampling of tokens."""


@dataclass(frozen=True)
class LayerDescription:
    """One expert layer."""

    shape: LayerShape
    layout: str
    """How the weights of its experts are kept."""
    top_k: int | None
    """Routed experts of a token; None where no attribute says it."""
    key_entries: int | None
    """k: the highest contributions of a sample, whose neurons are its key neurons; None where the rule names no number
    for each layer."""


def describe(model: nn.Module, layers: tuple[ExpertLayer, ...], rule: Rule) -> list[LayerDescription]:
    """A description of each layer.

    Args:
        model: the model that the layers are of; may be on the meta device.
        layers: what `find_expert_layers` found.
        rule: which contributions make key neurons.
    """
    return [
        LayerDescription(
            shape=layer.shape,
            layout=layer.layout,
            top_k=_top_k(model, layer),
            key_entries=rule.n_entries(layer.shape.n_neurons) if rule.kind == "top_fraction" else None,
        )
        for layer in layers
    ]


def _top_k(model: nn.Module, layer: ExpertLayer) -> int | None:
    if layer.shape.n_routed == 1:
        return 1
    experts = {module for part in layer.experts for owner in part.modules for module in owner.modules()}
    modules = [module for module in layer.scope.modules() if module not in experts]
    for holder, names in (*((module, _IN_MODULES) for module in modules), (text_config(model), _IN_CONFIGS)):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= layer.shape.n_routed:
                return value
    return None

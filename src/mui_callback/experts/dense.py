"""The MLPs of dense layers, as layers of one expert each."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from torch import nn

from mui_callback.experts.called import CalledExperts
from mui_callback.experts.down import LinearDown
from mui_callback.experts.layer import ExpertLayer
from mui_callback.experts.linear import down_projection, is_linear
from mui_callback.experts.paths import is_inside, is_numbered
from mui_callback.layout import LayerShape


def find_dense_layers(modules: dict[str, nn.Module], taken: Sequence[str]) -> list[tuple[str, ExpertLayer]]:
    """Every MLP inside a decoder layer (an element of a list of modules), by its path; those in `taken` left out."""
    layers: list[tuple[str, ExpertLayer]] = []
    claimed = list(taken)
    for path, module in modules.items():
        if any(is_inside(path, other) for other in claimed) or not _is_in_a_layer(path):
            continue
        down = _own_mlp(path, module) if is_numbered(path) else down_projection(path, module)
        if down is None:
            continue
        experts = CalledExperts(path, [LinearDown(path, down)], [down], is_routed=False, activations_in=[module])
        shape = LayerShape(layer=0, path=path, n_routed=1, routed_width=experts.width)
        adds_residual = "residual" in inspect.signature(type(module).forward).parameters
        layers.append((path, ExpertLayer(shape, (experts,), module, not is_numbered(path) and not adds_residual)))
        claimed.append(path)
    return layers


def _is_in_a_layer(path: str) -> bool:
    return any(part.isdecimal() for part in path.split("."))


def _own_mlp(path: str, layer: nn.Module) -> nn.Module | None:
    """The down projection of a decoder layer that holds the linear maps of its MLP itself (OPT)."""
    own = nn.ModuleDict({name: child for name, child in layer.named_children() if is_linear(child)})
    return down_projection(path, own)

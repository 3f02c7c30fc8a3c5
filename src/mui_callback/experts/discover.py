"""Finding the MoE layers of a model by their structure, whatever family it is of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from mui_callback.errors import NoExpertsError, UnsupportedModelError
from mui_callback.experts.adapters import adapted
from mui_callback.experts.base import Experts
from mui_callback.experts.dense import find_dense_layers
from mui_callback.experts.expert_parallelism import Spread, find_spread, refuse_parts_of_experts
from mui_callback.experts.layer import ExpertLayer
from mui_callback.experts.lists import find_list, find_stacked_parameter, has_router
from mui_callback.experts.paths import is_inside, is_numbered, language_model_modules, layer_numbers, outside
from mui_callback.experts.shared import SHARED_NAMES, find_shared_experts, has_shared
from mui_callback.experts.stacked import StackedExperts, has_stacked_layout
from mui_callback.layout import LayerShape

_BESIDE_RESIDUAL = ".deepspeed_moe"
"""What DeepSpeed's MoE holds its routed experts in, beside the MLP of a residual MoE."""


def find_expert_layers(model: nn.Module, *, dense: bool = False) -> tuple[ExpertLayer, ...]:
    """All MoE layers of the model, in the order of its modules.

    Args:
        model: any module that holds them.
        dense: also take the MLP of each layer without experts, as a layer of one expert.

    Raises:
        NoExpertsError: the model has none; the message says what was looked for.
        UnsupportedModelError: experts were found that cannot be read.
    """
    modules = language_model_modules(model)
    found = list(_moe_layers(modules))
    if dense:
        layer_paths = [_decoder_layer(path) for path, _ in found]
        found += find_dense_layers(modules, layer_paths)
        order = {path: position for position, path in enumerate(modules)}
        found.sort(key=lambda entry: order[entry[0]])
    if not found:
        raise NoExpertsError(
            f"{type(model).__name__} has no MoE layer that can be probed. Looked among its {len(modules)} modules for "
            "experts with stacked weights (parameters gate_up_proj or up_proj, and down_proj, of shape "
            "[experts, …, …]) and for lists of equal MLPs beside a router. "
            "A dense model can be probed with dense=True (--dense); what structure does not tell, register_adapter can."
            if not dense
            else f"{type(model).__name__} has no MLP that can be probed: looked among its {len(modules)} modules for "
            "MoE layers, and in each decoder layer for linear maps to neurons and back."
        )
    for _, layer in found:
        for experts in layer.experts:
            for module in experts.modules:
                refuse_parts_of_experts(experts.path, module)
    numbers = layer_numbers(model, [layer.shape.path for _, layer in found])
    layers = tuple(
        replace(layer, shape=replace(layer.shape, layer=number))
        for (_, layer), number in zip(found, numbers, strict=True)
    )
    _check_numbers(layers)
    return layers


def _moe_layers(modules: dict[str, nn.Module]) -> Iterator[tuple[str, ExpertLayer]]:
    layers: dict[nn.Module, ExpertLayer] = {}
    for path, layer in _candidates(modules):
        experts = layer.experts[0].modules[0]
        known = layers.get(experts)
        if known is None:
            layers[experts] = layer
            yield path, layer
        elif known.scope is not layer.scope:  # else the same layer under another path
            raise UnsupportedModelError(
                f"{known.shape.path} and {layer.shape.path} share their experts, so it cannot be told which layer "
                "a neuron works for."
            )


def _candidates(modules: dict[str, nn.Module]) -> Iterator[tuple[str, ExpertLayer]]:
    claimed: list[str] = []
    for path, module in modules.items():
        if any(is_inside(path, other) for other in claimed):
            continue
        spread = find_spread(modules, path)
        told = adapted(path, module, spread)
        if told is not None:
            claimed.append(path)
            yield path, _layer(path, module, *told, scope_is_moe=not is_numbered(path))
            continue
        routed = None if path.rpartition(".")[2] in SHARED_NAMES else _find_routed(path, module, spread)
        if routed is None:
            continue
        claimed.append(path)
        block_path = _block_of(modules, path, module, routed)
        if block_path is not None:
            yield path, _structured_layer(modules, block_path, module, routed)


def _find_routed(path: str, module: nn.Module, spread: Spread) -> Experts | None:
    if has_stacked_layout(module):
        return StackedExperts(path, module, spread)
    return find_stacked_parameter(path, module, spread) or find_list(path, module, spread)


def _block_of(modules: dict[str, nn.Module], path: str, module: nn.Module, routed: Experts) -> str | None:
    """The path of the module that holds experts and router; None if there is no router, so that it is no MoE."""
    block = outside(path)
    if isinstance(routed, StackedExperts):
        return block
    if not isinstance(module, nn.ModuleList | nn.ModuleDict):
        return path if has_router(module, routed.n_experts) else block
    while not has_router(modules[block], routed.n_experts, beside=module):
        if is_numbered(block) or not block:
            return None
        block = outside(block)
    return block


def _structured_layer(
    modules: dict[str, nn.Module], block_path: str, module: nn.Module, routed: Experts
) -> ExpertLayer:
    outer_path = outside(block_path)
    scope_path, scope_is_moe = block_path, not is_numbered(block_path)
    # Some keep the shared experts beside the block of the routed ones.
    if scope_is_moe and (has_shared(modules[outer_path]) or block_path.endswith(_BESIDE_RESIDUAL)):
        scope_path, scope_is_moe = outer_path, not is_numbered(outer_path)
    shared = find_shared_experts(scope_path, modules[scope_path], module, routed.width)
    return _layer(block_path, modules[scope_path], routed, shared, scope_is_moe=scope_is_moe)


def _layer(
    path: str, scope: nn.Module, routed: Experts, shared: tuple[Experts, ...], *, scope_is_moe: bool
) -> ExpertLayer:
    shape = LayerShape(
        layer=0,
        path=path,
        n_routed=routed.n_experts,
        routed_width=routed.width,
        shared_widths=tuple(part.width for part in shared for _ in range(part.n_experts)),
    )
    return ExpertLayer(shape, (routed, *shared), scope, scope_is_moe)


def _decoder_layer(path: str) -> str:
    """The path of the list element that a module is in."""
    parts = path.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdecimal()), default=len(parts) - 1)
    return ".".join(parts[: last + 1])


def _check_numbers(layers: tuple[ExpertLayer, ...]) -> None:
    """Neurons are named by the number of their layer, so no two layers may share one."""
    paths: dict[int, str] = {}
    for shape in (layer.shape for layer in layers):
        if shape.layer in paths:
            raise UnsupportedModelError(
                f"expected MoE layers with different numbers in their paths, got {paths[shape.layer]} and {shape.path}"
            )
        paths[shape.layer] = shape.path

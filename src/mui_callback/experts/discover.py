"""Finding the MoE layers of a model by their structure, whatever family it is of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mui_callback.errors import NoExpertsError, UnsupportedModelError
from mui_callback.experts.shared import SHARED_NAMES, SharedExperts, find_shared_experts
from mui_callback.experts.stacked import StackedExperts, has_stacked_layout
from mui_callback.layout import ExpertLayout, LayerShape

_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "base_layer")
"""Names under which wrappers (torch.compile, checkpointing, FSDP, PEFT) keep the module that they wrap."""


@dataclass(frozen=True)
class ExpertLayer:
    """One MoE layer: its experts, and the module at whose end all of them have run."""

    shape: LayerShape
    routed: StackedExperts
    shared: tuple[SharedExperts, ...]
    scope: nn.Module
    """The module whose forward calls all experts of the layer."""
    scope_is_moe: bool
    """Whether the output of `scope` is the output of the MoE layer. If so, what `scope` does to the experts' outputs
    (a gate on the shared expert, a scaling factor, a projection) belongs to the contributions; if not, `scope` is a
    decoder layer and the output of the MoE layer is the sum of the experts' outputs."""


def find_expert_layers(model: nn.Module) -> tuple[ExpertLayer, ...]:
    """All MoE layers of the model, in the order of its modules.

    Raises:
        NoExpertsError: the model has none; the message says what was looked for.
        UnsupportedModelError: experts were found whose weights cannot be read.
    """
    modules = dict(model.named_modules())
    layers = tuple(
        _expert_layer(modules, path, module) for path, module in modules.items() if has_stacked_layout(module)
    )
    if not layers:
        raise NoExpertsError(
            f"{type(model).__name__} has no MoE layer that can be probed. Looked among its {len(modules)} modules for "
            "experts with stacked weights (parameters gate_up_proj or up_proj, and down_proj, of shape "
            "[experts, …, …], run through transformers' use_experts_implementation). "
            "Is this a dense model, or one whose experts are a list of modules?"
        )
    _check_numbers(layers)
    return layers


def layout_of(layers: tuple[ExpertLayer, ...]) -> ExpertLayout:
    """The numbering of the layers' experts and neurons."""
    return ExpertLayout([layer.shape for layer in layers])


def _expert_layer(modules: dict[str, nn.Module], path: str, module: nn.Module) -> ExpertLayer:
    routed = StackedExperts(path, module)
    block_path = _outside(path)
    outer_path = _outside(block_path)
    scope_path, scope_is_moe = block_path, not _is_numbered(block_path)
    # Granite keeps the shared MLP beside the block of the routed experts, in the decoder layer.
    if scope_is_moe and _is_numbered(outer_path) and _has_shared(modules[outer_path]):
        scope_path, scope_is_moe = outer_path, False
    shared = find_shared_experts(scope_path, modules[scope_path], routed.width)
    shape = LayerShape(
        layer=_layer_number(path),
        path=block_path,
        n_routed=routed.n_experts,
        routed_width=routed.width,
        shared_widths=tuple(part.expert_width for part in shared for _ in range(part.width // part.expert_width)),
    )
    return ExpertLayer(shape, routed, shared, modules[scope_path], scope_is_moe)


def _unwrapped(path: str) -> str:
    """The path of the outermost wrapper around a module, which is its place in the model."""
    while path.rpartition(".")[2] in _WRAPPED:
        path = path.rpartition(".")[0]
    return path


def _outside(path: str) -> str:
    """The path of the module that holds this one."""
    return _unwrapped(path).rpartition(".")[0]


def _check_numbers(layers: tuple[ExpertLayer, ...]) -> None:
    """Neurons are named by the number of their layer, so no two layers may share one."""
    paths: dict[int, str] = {}
    for shape in (layer.shape for layer in layers):
        if shape.layer in paths:
            raise UnsupportedModelError(
                f"expected MoE layers with different numbers in their paths, got {paths[shape.layer]} and {shape.path}"
            )
        paths[shape.layer] = shape.path


def _has_shared(block: nn.Module) -> bool:
    return any(isinstance(getattr(block, name, None), nn.Module) for name in SHARED_NAMES)


def _is_numbered(path: str) -> bool:
    """Whether the path ends in a number, as that of a decoder layer in its list does."""
    return _unwrapped(path).rpartition(".")[2].isdecimal()


def _layer_number(path: str) -> int:
    """The last number in a module path: 7 of ``model.layers.7.mlp.experts``."""
    numbers = [int(part) for part in path.split(".") if part.isdecimal()]
    return numbers[-1] if numbers else 0

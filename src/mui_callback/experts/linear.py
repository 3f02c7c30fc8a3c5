"""Linear maps, and which of those in a module is the down projection."""

from __future__ import annotations

from torch import nn

from mui_callback.errors import UnsupportedModelError
from mui_callback.experts.norms import is_norm
from mui_callback.parallel.weights import whole_shape

_DOWN_NAMES = ("down_proj", "output_linear", "fc2", "fc_out", "w2", "c_proj", "wo", "dense_4h_to_h")
"""Names of down projections, for MLPs whose shapes leave it open."""


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear map: `nn.Linear`, whatever wraps or quantises it, transformers' ``Conv1D``."""
    return widths(module) is not None


def widths(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear map; None for other modules."""
    n_in, n_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(n_in, int) and isinstance(n_out, int):
        return n_in, n_out
    parameters = dict(module.named_parameters())
    weight, bias = parameters.pop("weight", None), parameters.pop("bias", None)
    if weight is None or len(whole_shape(weight)) != 2 or parameters or isinstance(module, nn.Embedding):
        return None
    rows, columns = whole_shape(weight)
    if bias is None:
        return columns, rows
    is_transposed = whole_shape(bias)[0] == columns != rows or type(module).__name__ == "Conv1D"
    return (rows, columns) if is_transposed else (columns, rows)


def linear_maps(module: nn.Module) -> dict[str, nn.Module]:
    """The linear maps inside a module by their path in it; what is inside of one (an adapter's) is part of it."""
    found: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        if is_linear(child):
            found[name] = child
        else:
            found |= {f"{name}.{path}": inner for path, inner in linear_maps(child).items()}
    return found


def down_projection(path: str, mlp: nn.Module) -> nn.Module | None:
    """The linear map of an MLP that its neurons write through; None if the module is no MLP.

    An MLP has one or two linear maps from its D inputs to its I neurons (or one to 2·I), one from I to D, and no
    parameters besides those and of norms.

    Raises:
        UnsupportedModelError: it has the shapes of an MLP, but which of its maps is the last cannot be told.
    """
    maps = linear_maps(mlp)
    if len(maps) not in (2, 3) or not _owns_nothing_else(mlp, maps):
        return None
    found = [name for name in maps if _is_down(name, maps)]
    if len(found) > 1:
        named = [name for name in found if name.rpartition(".")[2] in _DOWN_NAMES]
        if not named and len(maps) == 2:
            named = found[-1:]  # the other one would have the activation behind it, which a probe notices
        if len(named) != 1:
            raise UnsupportedModelError(
                f"{path}: its linear maps {', '.join(maps)} have the same shape, so which of them is the down "
                "projection cannot be told. `register_adapter` can name it."
            )
        found = named
    return maps[found[0]] if found else None


def _is_down(name: str, maps: dict[str, nn.Module]) -> bool:
    shapes = {other: widths(linear) for other, linear in maps.items()}
    here = shapes.pop(name)
    assert here is not None
    n_neurons, n_out = here
    ups = [shape for shape in shapes.values() if shape is not None]
    if len(ups) == 1:
        return ups[0] in ((n_out, n_neurons), (n_out, 2 * n_neurons))
    return all(shape == (n_out, n_neurons) for shape in ups)


def _owns_nothing_else(mlp: nn.Module, maps: dict[str, nn.Module]) -> bool:
    inside = {id(parameter) for linear in maps.values() for parameter in linear.parameters()}
    norms = [child for child in mlp.modules() if is_norm(child)]
    inside |= {id(parameter) for norm in norms for parameter in norm.parameters()}
    return all(id(parameter) in inside or whole_shape(parameter).numel() == 1 for parameter in mlp.parameters())

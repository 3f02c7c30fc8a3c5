"""The language model in the module that a trainer trains."""

from __future__ import annotations

from torch import nn

from mui_callback.errors import NoExpertsError, UnsupportedModelError
from mui_callback.experts.discover import find_expert_layers
from mui_callback.probe.freeze import frozen
from mui_callback.probe.head import LanguageModelHead


def named_model(holder: nn.Module, path: str) -> nn.Module:
    """The module at a path such as ``"student"`` or ``"model.decoder"``.

    Raises:
        UnsupportedModelError: there is none.
    """
    try:
        return holder.get_submodule(path)
    except AttributeError:
        names = ", ".join(name for name, _ in holder.named_children())
        raise UnsupportedModelError(
            f"moe_model: expected the path of a module in {type(holder).__name__}, which has {names}; got {path!r}"
        ) from None


def find_language_model(holder: nn.Module, *, dense: bool = False) -> nn.Module:
    """The one language model with experts in a module that need not be one, such as a LightningModule.

    A model of transformers with a head is one, and otherwise whatever the holder has as an attribute with experts and a
    head; if it has none such, it is itself the model.

    Args:
        holder: what is trained.
        dense: whether MLPs count as experts.

    Raises:
        UnsupportedModelError: there are several.
    """
    with frozen(holder):  # some weights are computed when they are looked at
        found = _outermost(_from_transformers(holder), dense) or _outermost(dict(holder.named_children()), dense)
    if len(found) > 1:
        raise UnsupportedModelError(
            f"{type(holder).__name__} holds {len(found)} language models with experts, {' and '.join(found)}: "
            f"say which one to probe, as moe_model={next(iter(found))!r}."
        )
    return next(iter(found.values()), holder)


def _from_transformers(holder: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in holder.named_modules() if hasattr(module, "get_output_embeddings")}


def _outermost(modules: dict[str, nn.Module], dense: bool) -> dict[str, nn.Module]:
    """Those that are language models with experts, but not in each other."""
    found: dict[str, nn.Module] = {}
    for path, module in modules.items():
        inside = any(path.startswith(f"{other}.") or not other for other in found)
        if not inside and _is_language_model(module, dense):
            found[path] = module
    return found


def _is_language_model(module: nn.Module, dense: bool) -> bool:
    try:
        LanguageModelHead(module)
    except UnsupportedModelError:
        return False
    try:
        find_expert_layers(module, dense=dense)
    except NoExpertsError:
        return False
    except UnsupportedModelError:
        pass  # what is wrong with it is said when it is to be probed
    return True

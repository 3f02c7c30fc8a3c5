"""The language model in the module that a trainer trains."""

from __future__ import annotations

from torch import nn

from mui_callback.errors import NoExpertsError, UnsupportedModelError
from mui_callback.experts.discover import find_expert_layers
from mui_callback.probe.freeze import in_eval_mode
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

    A model of transformers with a head is one, and otherwise whatever the holder has as an attribute (or in a container
    that is one) with experts and a head; if it has none such, it is itself the model.

    Args:
        holder: what is trained.
        dense: whether MLPs count as experts.

    Raises:
        UnsupportedModelError: there are several.
    """
    with in_eval_mode(holder):
        found = _from_transformers(holder, dense) or _of_plain_torch(holder, "", dense)
    if len(found) > 1:
        raise UnsupportedModelError(
            f"{type(holder).__name__} holds {len(found)} language models with experts, {' and '.join(found)}: "
            f"say which one to probe, as moe_model={next(iter(found))!r}."
        )
    return next(iter(found.values()), holder)


def _from_transformers(holder: nn.Module, dense: bool) -> dict[str, nn.Module]:
    """By path; those in others are left out."""
    found: dict[str, nn.Module] = {}
    for path, module in holder.named_modules():
        is_inside = any(path.startswith(f"{other}.") or not other for other in found)
        if not is_inside and hasattr(module, "get_output_embeddings") and _is_language_model(module, dense):
            found[path] = module
    return found


def _of_plain_torch(holder: nn.Module, path: str, dense: bool) -> dict[str, nn.Module]:
    """The attributes of the holder, or what is in those that only contain them."""
    found: dict[str, nn.Module] = {}
    for name, module in holder.named_children():
        inner = f"{path}.{name}" if path else name
        can_run = type(module).forward is not nn.Module.forward
        if can_run and _is_language_model(module, dense):
            found[inner] = module
        elif not can_run:
            found |= _of_plain_torch(module, inner, dense)
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

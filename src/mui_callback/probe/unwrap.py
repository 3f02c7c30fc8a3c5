"""The model inside of what a framework wrapped around it."""

from __future__ import annotations

from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that `torch.compile`, DDP, `accelerate` or a DeepSpeed engine holds; any other one as it is.

    Compiled modules keep it as ``_orig_mod``; the others as ``module``, beside which they have no weights.
    """
    children = dict(model.named_children())
    inner = children.get("_orig_mod")
    if inner is None and _holds_all(model, children.get("module")):
        inner = children["module"]
    return model if inner is None else unwrapped(inner)


def _holds_all(model: nn.Module, inner: nn.Module | None) -> bool:
    return inner is not None and {id(p) for p in model.parameters()} == {id(p) for p in inner.parameters()}

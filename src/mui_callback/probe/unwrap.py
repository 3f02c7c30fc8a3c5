"""The model inside of what a framework wrapped around it."""

from __future__ import annotations

from torch import nn

_NAMES = ("_orig_mod", "module", "_forward_module")
"""Under which `torch.compile`, DDP or a DeepSpeed engine, and Fabric hold the model."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that a wrapper holds; any other module as it is.

    A wrapper is told by the name of the module in it, beside which it has no weights.
    """
    children = dict(model.named_children())
    inner = next((children[name] for name in _NAMES if name in children), None)
    return unwrapped(inner) if inner is not None and _weights(inner) == _weights(model) else model


def _weights(module: nn.Module) -> set[int]:
    return {id(parameter) for parameter in module.parameters()}

"""Putting our own experts function behind transformers' experts interface, for a while.

An experts module looks up its forward at every call, by the name in its config. While the context lasts, a function
of ours is registered and the config names it; afterwards both are as they were.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

ExpertsForward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden states ``[T, D]``, expert ids ``[T, K]``, routing weights ``[T, K]``) → output ``[T, D]``."""

_NAME = "mui_probe"
_SETTING = "_experts_implementation_internal"  # the public setter would change sub-configs too

_forwards: dict[nn.Module, ExpertsForward] = {}
_previous: dict[int, Any] = {}
"""What the configs named, by identity of the config."""


@contextmanager
def route_experts_through(module: nn.Module, forward: ExpertsForward) -> Iterator[None]:
    """Let an experts module run `forward` while the context lasts."""
    registry: Any = sys.modules["transformers.integrations.moe"].ALL_EXPERTS_FUNCTIONS
    config: Any = module.config
    is_first = id(config) not in _previous
    if is_first:
        _previous[id(config)] = getattr(config, _SETTING)
    _forwards[module] = forward
    registry[_NAME] = _run
    try:
        setattr(config, _SETTING, _NAME)
        yield
    finally:
        del _forwards[module]
        if is_first:
            setattr(config, _SETTING, _previous.pop(id(config)))
        if not _forwards:
            del registry[_NAME]


def _run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = _forwards.get(module)
    if forward is not None:
        return forward(*args, **kwargs)
    # Shares its config with layers that are read, without being one of them.
    registry: Any = sys.modules["transformers.integrations.moe"].ALL_EXPERTS_FUNCTIONS
    eager = type(module).forward.__wrapped__  # type: ignore[attr-defined]
    config: Any = module.config
    return registry.get(_previous[id(config)], eager)(module, *args, **kwargs)

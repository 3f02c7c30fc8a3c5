"""Putting our own experts function behind transformers' experts interface, for a while.

An experts module looks up its forward at every call, by the name in its config. While the context lasts, a function
of ours is registered and the configs name it; afterwards both are as they were.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

ExpertsForward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden states ``[T, D]``, expert ids ``[T, K]``, routing weights ``[T, K]``) → output ``[T, D]``."""

_NAME = "mui_probe"
_SETTING = "_experts_implementation_internal"  # the public setter would change sub-configs too


@contextmanager
def route_experts_through(forwards: Mapping[nn.Module, ExpertsForward]) -> Iterator[None]:
    """Let each of the given experts modules run its function instead of its forward while the context lasts."""
    if not forwards:
        yield
        return
    registry: Any = sys.modules["transformers.integrations.moe"].ALL_EXPERTS_FUNCTIONS
    configs: dict[int, Any] = {id(module.config): module.config for module in forwards}
    previous = {key: getattr(config, _SETTING) for key, config in configs.items()}

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = forwards.get(module)
        if run is not None:
            return run(*args, **kwargs)
        # Shares its config with layers that are read, without being one of them.
        eager = type(module).forward.__wrapped__  # type: ignore[attr-defined]
        return registry.get(previous[id(module.config)], eager)(module, *args, **kwargs)

    registry[_NAME] = forward
    try:
        for config in configs.values():
            setattr(config, _SETTING, _NAME)
        yield
    finally:
        for key, config in configs.items():
            setattr(config, _SETTING, previous[key])
        del registry[_NAME]

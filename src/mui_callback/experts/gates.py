"""Activations without the up factor, act(x·W_g), as the reference code of arXiv 2504.07440 reads them.

They are the output of the activation function, which has to be a module of the expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from mui_callback.errors import UnsupportedModelError

_NAMES = ("act_fn", "activation_fn", "act", "activation")


class GateReader:
    """Notes the output of the activation function of each expert, until its down projection is reached.

    Args:
        path: of the experts, for messages.
        modules: the experts.

    Raises:
        UnsupportedModelError: one has no module for its activation function, or several.
    """

    def __init__(self, path: str, modules: Sequence[nn.Module]) -> None:
        self._functions = dict.fromkeys(_activation_function(path, module) for module in modules)
        self._last: Tensor | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While it lasts, outputs are noted."""
        with ExitStack() as stack:
            for function in self._functions:
                stack.enter_context(function.register_forward_hook(self._note))
            yield

    def take(self) -> Tensor | None:
        """The last output since the last call of this; None if there is none."""
        gate, self._last = self._last, None
        return gate

    def _note(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self._last = out.detach().clone()  # the up factor may be multiplied in place


def _activation_function(path: str, expert: nn.Module) -> nn.Module:
    found = [
        module
        for name, module in expert.named_modules()
        if name.rpartition(".")[2] in _NAMES and not list(module.children())
    ]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{path}: activation='gate' reads the output of the activation function, and expected one module named "
            f"{', '.join(_NAMES[:-1])} or {_NAMES[-1]} in {type(expert).__name__}, got {len(found)}"
        )
    function: nn.Module = found[0]
    return function

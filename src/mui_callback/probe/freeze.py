"""A model held still: whatever a forward pass could leave behind is as before when the context ends."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients and no compiled code inside; no trace afterwards, after an exception neither.

    Restored are the training mode of every module by itself, the attributes and buffers of every module (a forward
    may count load, cache frequencies or record an auxiliary loss there), the random states of Python, numpy, torch
    and every device, the grad mode, and the autocast cache. `nn.Module.train` and `eval` are not called: adapters
    merge weights in them.
    """
    modules = [_ModuleState(module) for module in model.modules()]
    try:
        with random_state_kept(), torch.no_grad():
            for state in modules:
                state.module.training = False
                if getattr(state.module, "_compiled_call_impl", None) is not None:
                    state.module._compiled_call_impl = None
            yield
    finally:
        for state in modules:
            state.restore()
        # Casts of weights made under no_grad have no history. Older versions of torch reuse them, to train with, in
        # an autocast that surrounds all of this.
        torch.clear_autocast_cache()


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Whatever is drawn inside, the random numbers drawn afterwards are those that would have come without it."""
    state = _RandomState()
    try:
        yield
    finally:
        state.restore()


class _ModuleState:
    """The attributes of one module, and copies of the tensors among them that a forward may write to."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = dict(vars(module))
        self.buffers = dict(module._buffers)
        own = [value for value in self.attributes.values() if isinstance(value, Tensor)]
        tensors = [*own, *(buffer for buffer in self.buffers.values() if buffer is not None)]
        self.copies = [(x, x._version, x.detach().clone()) for x in tensors if not x.is_inference()]

    def restore(self) -> None:
        attributes: dict[str, Any] = vars(self.module)
        for name in attributes.keys() - self.attributes.keys():
            del attributes[name]
        attributes.update(self.attributes)
        self.module._buffers.clear()
        self.module._buffers.update(self.buffers)
        with torch.no_grad():
            for tensor, version, copy in self.copies:
                if tensor._version != version:
                    tensor.copy_(copy)


class _RandomState:
    """The state of every random number generator that a forward may draw from."""

    def __init__(self) -> None:
        self.python = random.getstate()
        self.numpy = np.random.get_state()  # noqa: NPY002 - the global one is what others draw from
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if _has_cuda() else None
        self.mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state_all(self.cuda)
        if self.mps is not None:
            torch.mps.set_rng_state(self.mps)


def _has_cuda() -> bool:
    """Whether CUDA is in use: asking for its random state must not be what starts it."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]

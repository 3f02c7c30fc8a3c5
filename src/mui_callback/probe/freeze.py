"""A model held still: whatever a forward pass could leave behind is as before when the context ends."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mui_callback.errors import ProbeError

_CONTAINERS = (list, dict, set, deque)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients and no compiled code inside; no trace afterwards, after an exception neither.

    Restored are, of every module by itself, its training mode, attributes, containers and buffers (a forward may count
    load, cache frequencies or collect an auxiliary loss there) and the attributes of its config; the random states of
    Python, numpy, torch, every device and the generators that modules hold; the grad mode and the autocast cache.
    Backward hooks of users do not see what happens inside. `nn.Module.train` and `eval` are not called: adapters merge
    weights in them.

    Raises:
        ProbeError: a forward pass in eval mode wrote to a parameter, which cannot be undone.
    """
    versions = {name: parameter._version for name, parameter in model.named_parameters()}
    states = [_ObjectState(config) for config in _configs(model)]
    modules = [_ModuleState(module) for module in model.modules()]
    try:
        with ExitStack() as stack:
            stack.enter_context(random_state_kept())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            if hasattr(torch.compiler, "set_stance"):  # code compiled for training would be compiled again, with hooks
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for state in modules:
                state.hold()
            yield
    finally:
        for object_state in (*states, *modules):
            object_state.restore()
        # Casts of weights made under no_grad have no history. Older versions of torch reuse them, to train with, in
        # an autocast that surrounds all of this.
        torch.clear_autocast_cache()
    written = [name for name, parameter in model.named_parameters() if parameter._version != versions.get(name)]
    if written:
        raise ProbeError(
            f"a forward pass in eval mode wrote to parameters, which cannot be undone: {', '.join(written)}"
        )


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Whatever is drawn inside, the random numbers drawn afterwards are those that would have come without it."""
    restore = _random_state()
    try:
        yield
    finally:
        restore()


class _ObjectState:
    """The attributes of an object, and copies of those that can be written to in place."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.attributes = dict(vars(owner))
        values = self.attributes.values()
        self.containers = [(value, value.copy()) for value in values if type(value) in _CONTAINERS]
        self.generators = [(value, value.get_state()) for value in values if isinstance(value, torch.Generator)]
        self.tensors = _copies(values)

    def restore(self) -> None:
        # What did not change is not touched: compiled code may be guarded by the version of a dict.
        attributes: dict[str, Any] = vars(self.owner)
        for name in attributes.keys() - self.attributes.keys():
            del attributes[name]
        for name, value in self.attributes.items():
            if attributes.get(name, self) is not value:
                attributes[name] = value
        for container, content in self.containers:
            if _identities(container) != _identities(content):
                container.clear()
                (container.extend if isinstance(container, list | deque) else container.update)(content)
        for generator, generator_state in self.generators:
            generator.set_state(generator_state)
        with torch.no_grad():
            for tensor, copy in self.tensors:
                tensor.copy_(copy)


class _ModuleState(_ObjectState):
    """The same of a module, whose buffers and hooks are in containers."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.tensors += _copies(module._buffers.values())

    def hold(self) -> None:
        module: nn.Module = self.owner
        module.training = False
        module._backward_hooks = OrderedDict()
        module._backward_pre_hooks = OrderedDict()


def _identities(container: Any) -> list[Any]:
    """What is in a container, told apart by identity: values may be tensors, which do not compare."""
    if isinstance(container, dict):
        return [(key, id(value)) for key, value in container.items()]
    return sorted(map(id, container)) if isinstance(container, set) else list(map(id, container))


def _copies(values: Any) -> list[tuple[Tensor, Tensor]]:
    tensors = [value for value in values if isinstance(value, Tensor) and not value.is_inference()]
    return [(tensor, tensor.detach().clone()) for tensor in tensors if not tensor.is_meta]


def _configs(model: nn.Module) -> list[Any]:
    """The config objects of the modules, each once."""
    configs = {id(config): config for config in (getattr(module, "config", None) for module in model.modules())}
    return [config for config in configs.values() if hasattr(config, "__dict__")]


def _random_state() -> Callable[[], None]:
    """What puts every global random number generator back to its present state."""
    python, cpu = random.getstate(), torch.get_rng_state()
    from_numpy = np.random.get_state()  # noqa: NPY002 - the global one is what others draw from
    # To ask for the random state of CUDA must not be what starts it.
    has_cuda = bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state_all() if has_cuda else None

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(from_numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)

    return restore

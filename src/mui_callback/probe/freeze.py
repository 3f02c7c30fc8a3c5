"""A model held still: whatever a forward pass could leave behind is as before when the context ends."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from mui_callback.errors import ProbeError
from mui_callback.probe.checksum import checksum

_LEARNT = frozenset({"_external_params"})
"""Attributes that say which weights a module uses that are not its own: ZeRO-3 learns it in the first forward, marks
the weights, and would gather them no more if it was made to forget."""


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients and no compiled code inside; no trace afterwards, after an exception neither.

    Restored are, of every module by itself, its training mode, attributes, containers and buffers (a forward may count
    load, cache frequencies or collect an auxiliary loss there) and the attributes of its config; the random states of
    Python, numpy, torch, every device and the generators that modules hold; the grad mode and the autocast cache.
    Backward hooks of users do not see what happens inside. `nn.Module.train` and `eval` are not called: adapters merge
    weights in them.

    Raises:
        ProbeError: a forward pass in eval mode wrote to a parameter, which cannot be undone. That is seen of those that
            go through autograd, as the first one of each probe does (see `BelowAutograd`).
    """
    named_modules = dict(model.named_modules())
    parameters = dict(_named_parameters(named_modules))
    versions = {name: parameter._version for name, parameter in parameters.items()}
    sums = {name: checksum(parameter) for name, parameter in _rewritten_parameters(named_modules)}
    contents = _Contents()
    states = [_ObjectState(config, contents) for config in _configs(named_modules.values())]
    modules = [_ModuleState(module, contents) for module in named_modules.values()]
    with ExitStack() as restoring:  # each of them, whatever the others raise; attributes first
        # Casts of weights made under no_grad have no history. Older versions of torch reuse them, to train with, in
        # an autocast that surrounds all of this.
        restoring.callback(torch.clear_autocast_cache)
        restoring.callback(contents.restore)
        restoring.callback(_call_all, (held.restore_attributes for held in (*states, *modules)))
        with ExitStack() as stack:
            stack.enter_context(random_state_kept())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(_without_global_backward_hooks())
            if hasattr(torch.compiler, "set_stance"):  # code compiled for training would be compiled again, with hooks
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for state in modules:
                state.hold()
            yield
    written = [
        name
        for name, parameter in parameters.items()
        if parameter._version != versions[name] and (name not in sums or sums[name] != checksum(parameter))
    ]
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


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """To look at a model without running it: weights that are computed when they are looked at stay as they are."""
    training = {module: module.training for module in model.modules()}
    try:
        with random_state_kept(), torch.no_grad():
            for module in training:
                module.training = False
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def _without_global_backward_hooks() -> Iterator[None]:
    """Hooks on the backward passes of all modules do not see that a probe transposes parts of them."""
    registries = (module_hooks._global_backward_hooks, module_hooks._global_backward_pre_hooks)
    kept = [dict(registry) for registry in registries]
    for registry in registries:
        registry.clear()
    try:
        yield
    finally:
        for registry, hooks in zip(registries, kept, strict=True):
            registry.update(hooks)


def _named_parameters(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Each by its path; `named_parameters` would walk through the model again."""
    seen: set[nn.Parameter] = set()
    for path, module in modules.items():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                yield f"{path}.{name}" if path else name, parameter


def _rewritten_parameters(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that a forward may write to without changing them: adapters put themselves into stacked weights so."""
    for path, module in modules.items():
        if "ParamWrapper" in type(module).__name__ or hasattr(module, "parametrizations"):
            yield from module.named_parameters(prefix=path)


_WITHOUT_CONTENT = frozenset({type(None), bool, int, float, str, nn.Parameter})
_CONTAINERS = frozenset({dict, OrderedDict, list, set})


class _Contents:
    """What can be written to in place, of all objects together: few of these have more than empty containers."""

    def __init__(self) -> None:
        self._empty: list[Any] = []
        self._others: list[Callable[[], Any]] = []

    def add(self, values: Iterable[Any]) -> None:
        for value in values:
            kind = type(value)
            if kind in _WITHOUT_CONTENT:  # most of what there is
                continue
            if kind in _CONTAINERS and not value:
                self._empty.append(value)
            elif restore := _content(value):
                self._others.append(restore)

    def restore(self) -> None:
        _call_all(chain((container.clear for container in self._empty if container), self._others))


class _ObjectState:
    """The attributes of an object."""

    __slots__ = ("attributes", "owner")

    def __init__(self, owner: Any, contents: _Contents) -> None:
        self.owner = owner
        self.attributes = dict(vars(owner))
        for name in _LEARNT:
            self.attributes.pop(name, None)
        contents.add(self.attributes.values())

    def restore_attributes(self) -> None:
        # What did not change is not touched: compiled code may be guarded by the version of a dict.
        attributes: dict[str, Any] = vars(self.owner)
        before = self.attributes
        if list(attributes) == list(before) and all(map(is_, attributes.values(), before.values())):
            return
        for name in attributes.keys() - self.attributes.keys() - _LEARNT:
            del attributes[name]
        for name, value in self.attributes.items():
            if attributes.get(name, self) is not value:
                attributes[name] = value


class _ModuleState(_ObjectState):
    """The same of a module."""

    __slots__ = ()

    def hold(self) -> None:
        module: nn.Module = self.owner
        module.training = False
        if module._backward_hooks:
            module._backward_hooks = OrderedDict()
        if module._backward_pre_hooks:
            module._backward_pre_hooks = OrderedDict()


def _content(value: Any, holders: tuple[Any, ...] = ()) -> Callable[[], Any] | None:
    """What puts the content of a container, a tensor or a generator back; None for what has no content to restore.

    Parameters, modules and other objects that a container holds are put back as they are, not copied.
    """
    kind = type(value)
    if kind in _WITHOUT_CONTENT or issubclass(kind, nn.Module):
        return None
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, Tensor):
        is_copied = not (isinstance(value, nn.Parameter) or value.is_inference() or value.is_meta)
        return partial(_copy_back, value, value.detach().clone()) if is_copied else None
    if isinstance(value, np.ndarray):
        # A file that is mapped is not copied: it may be all of the training data.
        is_copied = value.flags.writeable and not isinstance(value, np.memmap)
        return partial(np.copyto, value, value.copy()) if is_copied else None
    if isinstance(value, list | dict | set | deque) and not any(value is holder for holder in holders):
        return _Container(value, holders).restore
    return None


def _call_all(actions: Iterable[Callable[[], Any]]) -> None:
    """Each of them, whatever the others raise; the first exception is raised when all were called."""
    errors = [error for action in actions if (error := _raised_by(action)) is not None]
    if errors:
        raise errors[0]


def _raised_by(action: Callable[[], Any]) -> BaseException | None:
    try:
        action()
    except BaseException as error:  # an interrupt does not stop it either
        return error
    return None


class _Container:
    """What is in a container, and in what it holds."""

    __slots__ = ("container", "content", "inner")

    def __init__(self, container: Any, holders: tuple[Any, ...]) -> None:
        self.container = container
        self.content: Any = (dict if isinstance(container, dict) else list)(container)
        inner: Iterable[Any] = container.values() if isinstance(container, dict) else container
        self.inner = [restore for part in inner if (restore := _content(part, (*holders, container)))]

    def restore(self) -> None:
        container = self.container
        if _identities(container) != _identities(self.content):
            container.clear()
            (container.extend if isinstance(container, list | deque) else container.update)(self.content)
        for restore in self.inner:
            restore()


def _copy_back(tensor: Tensor, copy: Tensor) -> None:
    # What did not change is not written to: it may be an expanded tensor, or wait for a backward pass.
    with torch.no_grad():
        if not torch.equal(tensor, copy):
            tensor.detach().copy_(copy)


def _identities(container: Any) -> list[Any]:
    """What is in a container, told apart by identity: values may be tensors, which do not compare."""
    if isinstance(container, dict):
        return [(key, id(value)) for key, value in container.items()]
    return list(map(id, container))


def _configs(modules: Iterable[nn.Module]) -> list[Any]:
    """The config objects of the modules, each once."""
    configs = {id(config): config for config in (getattr(module, "config", None) for module in modules)}
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

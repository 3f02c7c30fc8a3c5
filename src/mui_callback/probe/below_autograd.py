"""Forward passes whose operators do not go through autograd."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from inspect import getattr_static
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from mui_callback.parallel.shards import Shards
from mui_callback.parallel.weights import is_zero3

_KNOWN = ("torch.nn.", "transformers.")
"""Whose code does nothing in a forward that has to do with autograd, if it does not train."""
_PLAIN = (Tensor, nn.Parameter, type(None))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_OF_TORCH = (
    (torch._C, "_AutoDispatchBelowADInplaceOrView"),
    (torch._C, "_len_torch_dispatch_stack"),
    (torch._C._autograd, "_get_sequence_nr"),
)
"""What is used of torch that is not public; without it no batch is spared."""


class BelowAutograd:
    """Runs a batch below autograd if autograd recorded nothing in the batch before it.

    Under `torch.no_grad` every operator still goes through autograd, and versions of tensors are counted: of a small
    batch, that is an eighth of the time of the host. In `torch.inference_mode` none does, but what a model keeps of
    such a forward, in a cache for example, could not be trained with. Here tensors are ordinary ones.

    That nobody misses autograd is known of the code of torch and transformers only. Any other (a module, a hook, a
    forward in place of that of a class, a dispatch mode) may compute gradients in some batches, look at versions, write
    to a parameter, or want composite operators taken apart, so that a model with it is never spared. Nor is one in
    whose forward processes exchange tensors, or with tensors that are no plain ones (quantised weights, DTensors).

    Args:
        model: the model, before anything is attached to it.
        shards: who runs it.
    """

    def __init__(self, model: nn.Module, shards: Shards) -> None:
        self._can_be_spared = not shards.in_step and all(hasattr(*one) for one in _OF_TORCH) and _is_known(model)
        self._was_idle = False

    @contextmanager
    def batch(self, *, may_record: bool) -> Iterator[None]:
        """One batch, below autograd if that is possible.

        Args:
            may_record: whether autograd may have to record some of it.
        """
        if not self._can_be_spared or may_record or torch._C._len_torch_dispatch_stack():
            self._was_idle = False
            yield
            return
        before = torch._C._autograd._get_sequence_nr()  # operators that this thread has recorded so far
        with torch._C._AutoDispatchBelowADInplaceOrView() if self._was_idle else nullcontext():
            yield
        self._was_idle = torch._C._autograd._get_sequence_nr() == before


def _is_known(model: nn.Module) -> bool:
    """Whether there is nothing in the model but code of `_KNOWN` and plain tensors."""
    modules = list(model.modules())
    kinds = {type(module) for module in modules}
    hooks = [hook for module in modules for name in _HOOKS for hook in getattr(module, name).values()]
    hooks += [*_global_forward_hooks.values(), *_global_forward_pre_hooks.values()]
    forwards = [getattr_static(kind, "forward", None) for kind in kinds]
    return (
        all(str(getattr(code, "__module__", None)).startswith(_KNOWN) for code in (*kinds, *forwards, *hooks))
        and not any("forward" in vars(module) for module in modules)
        and all(map(_is_plain, chain.from_iterable(map(_tensors, modules))))
    )


def _tensors(module: nn.Module) -> Iterator[Tensor | None]:
    return chain(module._parameters.values(), module._buffers.values())


def _is_plain(tensor: Tensor | None) -> bool:
    return type(tensor) in _PLAIN and not is_zero3(tensor)

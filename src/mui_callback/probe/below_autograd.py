"""Forward passes whose operators do not go through autograd."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from mui_callback.parallel.shards import Shards
from mui_callback.parallel.weights import is_zero3, own_parameters


class BelowAutograd:
    """Runs a batch below autograd if autograd recorded nothing in the batch before it.

    Under `torch.no_grad` every operator still goes through autograd, and versions of tensors are counted: of a small
    batch, that is an eighth of the time of the host. In `torch.inference_mode` none does, but what a model keeps of
    such a forward, in a cache for example, could not be trained with. Here tensors are ordinary ones.

    After a batch in which autograd recorded anything (to follow a tail, or because the model computes gradients in its
    forward), the next one goes through it again. So does every batch of a model in whose forward processes exchange
    tensors, or with weights that are not plain `nn.Parameter` (quantised ones, DTensors, those of ZeRO-3). In a batch
    that is spared, versions are not counted, so `frozen` does not see that it writes to a parameter.

    Args:
        model: the model.
        shards: who runs it.
    """

    def __init__(self, model: nn.Module, shards: Shards) -> None:
        self._can_be_spared = not shards.in_step and all(map(_is_plain, own_parameters(model.modules())))
        self._was_idle = False

    @contextmanager
    def batch(self, *, may_record: bool) -> Iterator[None]:
        """One batch, below autograd if that is possible.

        Args:
            may_record: whether autograd may have to record some of it.
        """
        can_be_spared = self._can_be_spared and not may_record
        before = _n_recorded()
        with torch._C._AutoDispatchBelowADInplaceOrView() if can_be_spared and self._was_idle else nullcontext():
            yield
        self._was_idle = can_be_spared and _n_recorded() == before


def _is_plain(parameter: nn.Parameter) -> bool:
    return type(parameter) is nn.Parameter and not is_zero3(parameter)


def _n_recorded() -> int:
    """Operators that this thread has recorded so far."""
    number: int = torch._C._autograd._get_sequence_nr()
    return number

"""Forward passes whose operators do not go through autograd."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from mui_callback.parallel.shards import Shards
from mui_callback.parallel.weights import is_zero3


class BelowAutograd:
    """Spares a batch autograd if it had nothing to do in the one before.

    Under `torch.no_grad` every operator still goes through autograd, and counts versions of tensors: of a small batch,
    an eighth of the time that the host takes. In `torch.inference_mode` none does, but what a model keeps of such a
    forward, in a cache for example, could not be trained with. Here tensors are ordinary ones.

    A batch in which autograd recorded anything (to follow a tail, or because the model computes gradients in its
    forward) goes through it again, and so does every batch of a model in whose forward processes exchange tensors, or
    whose weights are no plain ones. In the others nobody counts versions: that a forward writes to a parameter,
    `frozen` sees in those batches that did go through autograd, the first one among them.

    Args:
        model: the model.
        shards: who runs it.
    """

    def __init__(self, model: nn.Module, shards: Shards) -> None:
        weights = (weight for module in model.modules() for weight in module._parameters.values())
        self._may_be = not shards.in_step and all(map(_is_plain, weights))
        self._was_idle = False

    @contextmanager
    def batch(self, *, is_recorded: bool) -> Iterator[None]:
        """A batch is run inside.

        Args:
            is_recorded: whether autograd may have to record some of it.
        """
        may_be = self._may_be and not is_recorded
        before = _n_recorded()
        with torch._C._AutoDispatchBelowADInplaceOrView() if may_be and self._was_idle else nullcontext():
            yield
        self._was_idle = may_be and _n_recorded() == before


def _is_plain(weight: nn.Parameter | None) -> bool:
    return weight is None or (type(weight) is nn.Parameter and not is_zero3(weight))


def _n_recorded() -> int:
    """Operators that this thread has recorded so far."""
    number: int = torch._C._autograd._get_sequence_nr()
    return number

"""Operators that compute what they say, and of which autograd sees nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def unrecorded(device: torch.device) -> AbstractContextManager[None]:
    """Without gradients, and with products in the dtype of their factors.

    It is entered for every layer of every batch, most often where both are off already.
    """
    is_on = torch.is_grad_enabled() or torch.is_autocast_enabled(device.type)
    return _unrecorded(device) if is_on else nullcontext()


@contextmanager
def _unrecorded(device: torch.device) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield

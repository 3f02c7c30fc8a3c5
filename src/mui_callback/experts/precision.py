"""Operators that compute what they say, and are not recorded."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Products in the dtype of their factors; where autocast is off, as most often, nothing is entered."""
    is_on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if is_on else nullcontext()


def unrecorded(device: torch.device) -> AbstractContextManager[object]:
    """The same without gradients; it is entered for every layer of every batch, most often where both are off."""
    if not torch.is_grad_enabled() and not torch.is_autocast_enabled(device.type):
        return nullcontext()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(without_autocast(device))
        return stack.pop_all()

"""Numbers on their way from the device to the host."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """Only who asks for them waits, and only until the device has come to where they were sent.

    Args:
        values: int64 ``[n]``.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values.to("cpu", non_blocking=values.is_cuda)
        self._arrived = None
        if values.is_cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(values.device))

    def get(self) -> list[int]:
        """The values."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values: list[int] = self._values.tolist()
        return values

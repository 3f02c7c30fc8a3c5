"""Values in TensorBoard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mui_callback.sinks.base import ProbePoint, RunDescription


class TensorBoardSink:
    """Adds the scalars of each point to a ``SummaryWriter``, of torch or of tensorboardX.

    Args:
        writer: returns it, when there is one by then; None for none.
    """

    name = "TensorBoard"

    def __init__(self, writer: Callable[[], Any]) -> None:
        self._writer = writer

    def open(self, run: RunDescription) -> None:
        """Nothing to do: the writer may not have been made yet."""

    def write(self, point: ProbePoint) -> None:
        """Add the scalars at the step of the point; a failed probe adds nothing."""
        writer = self._writer()
        if writer is None or not point.scalars:
            return
        for key, value in point.scalars.items():
            writer.add_scalar(key, value, point.step)
        writer.flush()

    def close(self) -> None:
        """The writer belongs to whoever trains, who closes it."""

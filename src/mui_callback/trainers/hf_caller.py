"""What an event of `transformers.Trainer` does not bring: the Trainer, and where training goes on from."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

_CHECKPOINT = "resume_from_checkpoint"
"""A variable of the method that has the training loop."""


def calling_trainer() -> Any:
    """The `Trainer` whose event is being handled, or None.

    The eval data is nowhere else before the first evaluation, so it is looked for among the callers.
    """
    return next((frame.f_locals["self"] for frame in _trainer_frames()), None)


def resumed_checkpoint() -> Path | None:
    """The checkpoint that the calling `Trainer` goes on from, or None."""
    variables = (frame.f_locals for frame in _trainer_frames())
    checkpoint = next((v[_CHECKPOINT] for v in variables if _CHECKPOINT in v), None)
    return Path(checkpoint) if isinstance(checkpoint, str | os.PathLike) else None


def _trainer_frames() -> Iterator[FrameType]:
    """The frames of the methods of a Trainer among the callers, the innermost first."""
    trainer_class = sys.modules["transformers"].Trainer
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), trainer_class):
            yield frame
        frame = frame.f_back

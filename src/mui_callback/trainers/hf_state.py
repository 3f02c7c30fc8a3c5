"""What a checkpoint of `transformers.Trainer` holds of the probes: a file in its directory.

The Trainer keeps the state of a callback only if it can make that callback anew from JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mui_callback.forgiving import described, warn

STATE_NAME = "mui_state.json"
"""Name of the file in the directory of a checkpoint."""


def write_state(checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Put the state into a checkpoint that was just saved; with a warning, if that is not possible."""
    if not state or not checkpoint.is_dir():
        return
    unfinished = checkpoint / f"{STATE_NAME}.tmp"
    try:
        unfinished.write_text(json.dumps(state))
        os.replace(unfinished, checkpoint / STATE_NAME)
    except OSError as error:
        warn(f"MUI: {checkpoint} does not hold what was probed so far: {described(error)}")


def read_state(checkpoint: Path | None) -> dict[str, Any] | None:
    """The state in a checkpoint; None without one, with a warning if it cannot be read."""
    if checkpoint is None or not (checkpoint / STATE_NAME).is_file():
        return None
    try:
        state = json.loads((checkpoint / STATE_NAME).read_text())
        if not isinstance(state, dict):
            raise ValueError(f"expected an object, got {state!r:.40}")
    except (OSError, ValueError) as error:
        warn(f"MUI: {checkpoint / STATE_NAME} cannot be read: {described(error)}")
        return None
    return state

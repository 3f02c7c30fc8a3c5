"""What a run that goes on knows of its past: from its checkpoint, and from the record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mui_callback.forgiving import described, warn
from mui_callback.metrics.trajectory import pruned
from mui_callback.monitoring.history import History, continued
from mui_callback.sinks.record import RecordedRun, read_record


def recalled(
    probed: Mapping[str, Any],
    start_step: int,
    record: Path,
    state: Mapping[str, Any] | None,
    window: int,
    *,
    must_be_known: bool,
) -> History:
    """The history of a run that begins, or goes on, now; with a warning where it is not known, or is of no use.

    Args:
        probed: how it is probed now; see `RunDescription.to_dict`.
        start_step: optimizer steps done; 0 for a run that begins.
        record: the file; looked at only where a run goes on.
        state: what a checkpoint holds.
        window: points that a phase is called from.
        must_be_known: raise instead of a warning.

    Raises:
        OSError: with `must_be_known`, the record cannot be read.
        ValueError: with `must_be_known`, the state is none.
    """
    recorded: list[RecordedRun] = []
    complaints: list[str] = []
    if start_step or state:
        try:
            recorded, complaints = read_record(record)
        except OSError as error:
            if must_be_known:
                raise
            complaints = [f"the points that were logged before are not known: {described(error)}"]
    for complaint in complaints:
        warn(f"MUI: {complaint}")
    try:
        history, changed = continued(probed, start_step, recorded, state)
    except ValueError as error:
        if must_be_known:
            raise
        warn(f"MUI: the checkpoint does not say what was measured before: {error}")
        history, changed = continued(probed, start_step, recorded, None)
    if changed:
        warn(
            f"MUI: training goes on at step {start_step}, but is probed in another way than before "
            f"({'; '.join(changed)}). Points before and after cannot be compared."
        )
    history.trajectories = pruned(history.trajectories, start_step, window)
    return history

"""What could not be measured, and why: a line for each, which all processes of a study read."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from traceback import format_exception

from mui_callback.errors import MUIError
from mui_callback.forgiving import described
from mui_callback.json_lines import append_line, whole_lines
from mui_callback.trajectory.checkpoint import CheckpointId

_NAME = "failures.jsonl"


def in_words(error: BaseException) -> str:
    """What happened; errors of this package say it all in their text."""
    return str(error) if isinstance(error, MUIError) else described(error)


class Failures:
    """Those of a study since this process began; earlier ones are tried again.

    Args:
        directory: of the study.
    """

    def __init__(self, directory: Path) -> None:
        self._file = directory / _NAME
        self._start = time.time()

    def add(self, checkpoint: CheckpointId, error: BaseException) -> None:
        """Write one down.

        Raises:
            OSError: it cannot be written.
        """
        line = {
            "time": time.time(),
            "checkpoint": asdict(checkpoint),
            "error": in_words(error),
            "traceback": "".join(format_exception(error)),
        }
        append_line(self._file, line)

    def read(self) -> dict[CheckpointId, str]:
        """The last error of each checkpoint that failed, in whichever process."""
        return read_failures(self._file.parent, since=self._start)


def read_failures(directory: Path, *, since: float = 0.0) -> dict[CheckpointId, str]:
    """The last error of each checkpoint of a study that failed.

    Args:
        directory: of the study.
        since: earlier ones, in seconds of Unix time, are left out.
    """
    return {
        CheckpointId(**failure["checkpoint"]): failure["error"]
        for failure in whole_lines(directory / _NAME)
        if failure["time"] >= since
    }

"""Files of JSON, one object a line, that grow while somebody reads them and whoever writes them may be killed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append a line, handed to the system at once, whole or not at all; the file and its directory are made.

    Raises:
        OSError: it cannot be written.
        ValueError: it has a number that JSON has not.
    """
    line = json.dumps(row, allow_nan=False).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        if size and _last_byte(path) != b"\n":  # the writer before was killed
            line = b"\n" + line
        written = file.write(line)  # one system call: an interrupt comes before it or after it
        if written != len(line):
            file.truncate(size)
            raise OSError(f"{path}: only {written} of {len(line)} bytes could be written; is the disk full?")


def whole_lines(path: Path) -> Iterator[Any]:
    """What the lines hold, but for those of writers that were killed; nothing without a file.

    Raises:
        OSError: it cannot be read.
    """
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(ValueError):
            yield json.loads(line)


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read()

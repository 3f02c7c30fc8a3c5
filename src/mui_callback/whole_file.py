"""Files that are written whole: replaced at once, or left as they are."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def remove_partial(directory: Path, name: str = "") -> None:
    """Remove what processes that were killed have left of files and directories whose names begin so.

    To be called where nobody else writes them.
    """
    for left in directory.glob(f".{name}*.partial"):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


@contextmanager
def replaced_at_once(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The path of a file beside it to write to, which takes its place at the end, and is removed after an exception.

    Raises:
        OSError: it cannot take its place.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)

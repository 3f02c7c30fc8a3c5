"""`mui-callback watch`: frames of a record that grows."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from mui_callback.errors import MUIError
from mui_callback.monitoring.run_monitor import RECORD_NAME
from mui_callback.sinks.jsonl import RecordedRun, read_record
from mui_callback.watch.frame import frame
from mui_callback.watch.watched_run import last_run

_SECONDS = 0.5
"""Between looks at the file; it is read only where it has changed."""


def watch_record(path: Path, *, once: bool, console: Console) -> None:
    """Show the last run of a record until Ctrl-C, a new frame whenever there is more of it.

    Args:
        path: the output directory of a run, or the record; it is waited for.
        once: print one frame and end; always where the console is no terminal.
        console: where to.

    Raises:
        MUIError: there is something else at the path, or it cannot be read; with `once`, there is no record yet.
    """
    record = Record(path)
    if once or not console.is_terminal:
        record.look()
        if not record.exists:
            raise MUIError(f"{record.path}: there is no record yet; without --once, watch waits for it")
        console.print(record.frame(console.width, None))
        return
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                record.look()
                live.update(record.frame(console.width, console.height), refresh=True)
                time.sleep(_SECONDS)
    except KeyboardInterrupt:
        console.print(record.frame(console.width, None))


class Record:
    """A record that is read again when it has changed.

    Args:
        path: the file, or the directory that it is in.
    """

    def __init__(self, path: Path) -> None:
        self.path = path if path.suffix == ".jsonl" else path / RECORD_NAME
        self._seen: tuple[int, int, int] | None = None
        self._runs: list[RecordedRun] = []
        self._unread = 0

    @property
    def exists(self) -> bool:
        """Whether it did when it was last looked at."""
        return self._seen is not None

    def look(self) -> bool:
        """Read it if it is another one than before; whether it was."""
        try:
            found = self.path.stat()
            seen = (found.st_ino, found.st_size, found.st_mtime_ns)
            if seen == self._seen:
                return False
            self._runs, complaints = read_record(self.path)
        except (FileNotFoundError, NotADirectoryError):
            changed = self.exists
            self._seen, self._runs, self._unread = None, [], 0
            return changed
        except OSError as error:
            raise MUIError(f"{self.path}: cannot be read: {error}") from error
        self._seen, self._unread = seen, len(complaints)
        return True

    def frame(self, width: int, height: int | None) -> RenderableType:
        """What is known by now; a line of text while that is nothing."""
        run = last_run(self._runs)
        if run is not None:
            return frame(run, now=time.time(), width=width, height=height, unread=self._unread)
        waiting = f"{self.path}: {'no run in it yet' if self.exists else 'not there yet'}; waiting. Ctrl-C ends."
        return Text(waiting, style="yellow")

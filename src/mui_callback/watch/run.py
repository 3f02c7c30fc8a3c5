"""`mui-callback watch`: frames of a record that grows."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from mui_callback.errors import MUIError
from mui_callback.forgiving import attempt, described
from mui_callback.monitoring.run_monitor import RECORD_NAME
from mui_callback.sinks.record import RecordReader
from mui_callback.watch.frame import frame
from mui_callback.watch.watched_run import last_run

_SECONDS = 0.5
"""Between looks at the file."""


def watch_record(path: Path, *, once: bool, console: Console) -> None:
    """Show the last run of a record until Ctrl-C, a new frame every half second.

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
            waits = "without --once, watch waits for it" if once else "in a terminal, watch waits for it"
            raise MUIError(f"{record.path}: there is no record yet; {waits}")
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
    """A record that is read on when there is more of it.

    Args:
        path: the file, or the directory that it is in.
    """

    def __init__(self, path: Path) -> None:
        self.path = path if path.suffix == ".jsonl" else path / RECORD_NAME
        self._reader: RecordReader | None = None

    @property
    def exists(self) -> bool:
        """Whether it did when it was last looked at."""
        return self._reader is not None

    def look(self) -> None:
        """Read on.

        Raises:
            MUIError: it cannot be read.
        """
        reader = self._reader or RecordReader(self.path)
        try:
            reader.read()
        except (FileNotFoundError, NotADirectoryError):
            self._reader = None
            return
        except OSError as error:
            raise MUIError(f"{self.path}: cannot be read: {error}") from error
        self._reader = reader

    def frame(self, width: int, height: int | None) -> RenderableType:
        """What is known by now; a line of text while that is nothing."""
        reader = self._reader
        run = None if reader is None else last_run(reader.runs)
        if reader is not None and run is not None:
            shown, error = attempt(
                lambda: frame(run, now=time.time(), width=width, height=height, unread=len(reader.complaints))
            )
            if error is not None:
                return Text(f"{self.path}: expected a record of this version ({described(error)})", style="red")
            assert shown is not None
            return shown
        waiting = f"{self.path}:\n{'no run in it yet' if self.exists else 'not there yet'}; waiting. Ctrl-C ends."
        return Text(waiting, style="yellow")

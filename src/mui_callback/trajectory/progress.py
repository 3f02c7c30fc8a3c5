"""How far a study is: bars with the time left in a terminal, a line for each checkpoint anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class StudyProgress:
    """Bars over the checkpoints and, of the current one, over batches.

    Args:
        console: where to show them.
        is_quiet: for processes that say nothing.
        has_bars: whether this process shows bars, if the console is a terminal.
    """

    def __init__(self, console: Console, *, is_quiet: bool = False, has_bars: bool = True) -> None:
        self.console = console
        self.is_quiet = is_quiet
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=is_quiet or not has_bars or not console.is_terminal,
        )
        self._checkpoints: TaskID | None = None
        self._batches: TaskID | None = None

    @contextmanager
    def over(self, n_checkpoints: int, n_done: int) -> Iterator[None]:
        """While a study runs."""
        with self._bars:
            self._checkpoints = self._bars.add_task("checkpoints", total=n_checkpoints, completed=n_done)
            self._batches = self._bars.add_task("", total=None, visible=False)
            yield

    def begin(self, what: str) -> None:
        """A part of a checkpoint that takes a while, of which nobody knows how far it is."""
        if self._batches is not None:
            self._bars.reset(self._batches, total=None, description=what[:60], visible=True)

    def batch(self, done: int, total: int) -> None:
        """So many of its batches are done."""
        if self._batches is not None:
            self._bars.update(self._batches, completed=done, total=total)

    def checkpoint(self, line: str, *, style: str = "") -> None:
        """One more is done, of which there is something to say."""
        self.say(line, style=style)
        if self._checkpoints is not None:
            self._bars.advance(self._checkpoints)

    def say(self, line: str, *, style: str = "") -> None:
        """A line that stays."""
        if not self.is_quiet:
            self.console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)

"""A process that draws, beside the one that trains.

Drawing is half a second of Python; in a thread it would take that from the training loop, which holds the same lock.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from threading import Lock, Thread
from typing import IO, Any

from mui_callback.pictures.scene import Picture, Scene

_SECONDS = 2.0
"""Between looks at whether the process that trains is there."""


class StudioError(RuntimeError):
    """The process that draws said what went wrong, or ended."""


class Studio:
    """Draws scenes in a process of its own, which is started by the first one and again if it has ended.

    It is a new Python that imports neither torch nor what the user has written, at low priority; where the training
    process ends in whichever way, so does it.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closed = False
        self._lock = Lock()

    def draw(self, scene: Scene) -> dict[str, Picture]:
        """See `mui_callback.pictures.draw.draw`; waits for it.

        Raises:
            StudioError: it cannot be drawn, or the process ended.
            OSError: it cannot be started.
        """
        with self._lock:
            process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            _send(process.stdin, scene)
            found = pickle.load(process.stdout)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
            with self._lock:
                self._end()
            raise StudioError(f"the process that draws ended ({type(error).__name__})") from error
        if isinstance(found, str):
            raise StudioError(found)
        drawn: dict[str, Picture] = found
        return drawn

    def close(self) -> None:
        """End the process, whatever it is doing; nothing is drawn any more."""
        with self._lock:
            self._is_closed = True
            self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    _close(pipe)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._is_closed:
            raise StudioError("nothing is drawn any more")
        if self._process is None:
            # absolute, and none of the directory that the training is in, where a script may be called like a module
            paths = [os.path.abspath(os.fspath(path)) for path in sys.path if path]
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(os.getpid()), *paths],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=tempfile.gettempdir(),
                env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"},
                start_new_session=True,  # what interrupts the training in the terminal leaves the last pictures alone
            )
        return self._process


_PROGRAM = (
    "import os, sys; target = os.fdopen(os.dup(1), 'wb'); os.dup2(2, 1); sys.path[:] = sys.argv[2:]; "
    f"from {__name__} import main; main(int(sys.argv[1]), target)"
)
"""Nothing but pictures may come through the pipe that was standard output."""


def main(parent: int, target: IO[bytes]) -> None:
    """Draw what comes in, until nothing does any more.

    Args:
        parent: the process that trains. Where it has ended, so does this one, although whoever it has forked may still
            hold the pipe.
        target: where pictures go.
    """
    from mui_callback.pictures.draw import draw

    if hasattr(os, "nice"):
        os.nice(10)
    Thread(target=_end_with, args=(parent,), daemon=True).start()
    source = sys.stdin.buffer
    while True:
        try:
            scene = pickle.load(source)
        except EOFError:
            return
        try:
            found: Any = draw(scene)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        _send(target, found)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_SECONDS)
    os._exit(0)


def _send(target: IO[bytes], values: Any) -> None:
    target.write(pickle.dumps(values))
    target.flush()


def _close(pipe: IO[bytes]) -> None:
    with suppress(OSError):  # what was written last did not arrive
        pipe.close()

"""Several runs in processes of their own, without importing everything once for each."""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

with suppress(ImportError):
    import deepspeed  # noqa: F401 - or the Trainer imports it in each of them


def at_once(main: Callable[[Path, str], None], directory: Path, names: Iterable[str], *, n_at_a_time: int = 2) -> None:
    """Call ``main(directory / name, name)`` for each, in forks, some at a time; exits with 1 if any of them fails."""
    gc.freeze()  # or each would copy all that was imported when it looks for what is no longer needed
    failed = n_running = 0
    for name in names:
        if n_running == n_at_a_time:
            failed += os.wait()[1] != 0
            n_running -= 1
        n_running += 1
        if os.fork() == 0:
            code = 1
            try:
                main(directory / name, name)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)  # nothing of the parent's, which it would do at its exit
    failed += sum(os.wait()[1] != 0 for _ in range(n_running))
    sys.exit(failed > 0)

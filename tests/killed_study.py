"""A study that is killed again and again, at each thing that it does to the disk, and by a clock.

Run by itself, as each run is a fork of a process that has imported everything and computed nothing.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from itertools import count
from pathlib import Path
from typing import Any

import torch
import transformers.models.qwen2_moe.modeling_qwen2_moe  # noqa: F401 - or each run would

from studies import SUMS, run, save_checkpoints, save_tasks, study, table

_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")


def forked(action: Callable[[], object]) -> int:
    """Pid of a fork that does something, and nothing after it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            with redirect_stdout(StringIO()):
                action()
            code = 0
        finally:
            os._exit(code)
    return pid


def kill_at_change(number: int, directory: Path) -> None:
    """Have this process killed before it changes something in a directory for the nth time."""
    seen = count(1)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in _CHANGES) and str(directory) in str(arguments[0]) and next(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def main(directory: Path) -> None:
    source = save_checkpoints(directory / "run", (5, 10))
    tasks = save_tasks(directory / "tasks", sums=SUMS[:3])
    n_killed = {"change": 0, "clock": 0}

    def config(name: str) -> Any:
        return study(directory / name, source, tasks)

    start = time.perf_counter()
    assert os.waitpid(forked(lambda: run(config("undisturbed"))), 0)[1] == 0
    seconds = time.perf_counter() - start

    def finish(name: str) -> None:
        assert os.waitpid(forked(lambda: run(config(name))), 0)[1] == 0

    for number in count(1, 3):
        name = f"change-{number}"
        pid = forked(lambda: (kill_at_change(number, directory / name), run(config(name))))  # noqa: B023
        if os.waitpid(pid, 0)[1] == 0:  # it changes nothing so many times
            break
        n_killed["change"] += 1
        finish(name)
    clock = random.Random(0)
    for number in range(4):
        name = f"clock-{number}"
        for _ in range(2):
            pid = forked(lambda: run(config(name)))  # noqa: B023
            time.sleep(clock.uniform(0.2, 0.9) * seconds)
            os.kill(pid, signal.SIGKILL)
            n_killed["clock"] += os.waitpid(pid, 0)[1] == signal.SIGKILL
        finish(name)
    tables = {path.parent.name: table(path.parent) for path in directory.glob("*/results.parquet")}
    left = [str(path) for path in directory.rglob(".*.partial")]
    (directory / "seen.json").write_text(json.dumps({"tables": tables, "killed": n_killed, "left": left}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Loops that are probed while their W&B server, W&B's own process or the disk of the run fails.

What was seen goes to ``seen.json``: how long each step took, and the warnings.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import wandb

from forked import at_once
from integrations import make_model, probe_set
from mui_callback import MUIMonitor
from training import STEPS
from wandb_server import WandbServer

PATIENCE = 3.0
"""Seconds that W&B is told to wait at the beginning and at the end, where it would wait for minutes."""


def main(output_dir: Path, trouble: str) -> None:
    output_dir.mkdir()
    server = WandbServer()
    at_once, at_step_3 = troubles(server)[trouble]
    os.environ.update(server.environment)
    settings = wandb.Settings(init_timeout=PATIENCE, finish_timeout=PATIENCE, silent=True)
    seconds: list[float] = []
    with server, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if at_once is not None:
            at_once()
        with suppress(Exception):  # what W&B raises where it has no server is the user's to handle
            wandb.init(project="troubled", dir=output_dir, settings=settings)
        with MUIMonitor(make_model(), probe_set(), output_dir=output_dir, every=1) as monitor:
            for step in range(1, STEPS + 1):
                if step == 3 and at_step_3 is not None:
                    at_step_3()
                with suppress(Exception):  # more than W&B keeps in memory before it writes to the disk
                    wandb.run.log({"mine": "x" * 100_000})
                start = time.perf_counter()
                monitor.step(step)
                seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
        seconds.append(time.perf_counter() - start)
        if trouble in ("nothing", "the disk of the run is full"):
            with suppress(Exception):
                wandb.finish()
    said = [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
    rows = [row["mui/step"] for run in server.runs.values() for row in run.history if "mui/mui" in row]
    (output_dir / "seen.json").write_text(json.dumps({"seconds": seconds, "said": said, "rows": rows}))


def troubles(server: WandbServer) -> dict[str, tuple[Callable[[], None] | None, Callable[[], None] | None]]:
    """What happens before the run begins, and after two steps."""

    def behave(how: str) -> Callable[[], None]:
        return lambda: setattr(server, "behaviour", how)

    return {
        "nothing": (None, None),
        "refuses from the beginning": (behave("refuse"), None),
        "hangs from the beginning": (behave("hang"), None),
        "is not there": (server.vanish, None),
        "refuses": (None, behave("refuse")),
        "hangs": (None, behave("hang")),
        "denies": (None, behave("deny")),
        "vanishes": (None, server.vanish),
        "W&B's process is killed": (None, lambda: os.kill(wandb_core(), signal.SIGKILL)),
        "the disk of the run is full": (None, lambda: resource.prlimit(wandb_core(), resource.RLIMIT_FSIZE, (1, 1))),
    }


def wandb_core() -> int:
    """The process that this one has started for W&B."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            name, _, rest = status.read_text().rpartition(")")
            if "wandb-core" in name and int(rest.split()[1]) == os.getpid():
                return int(status.parent.name)
    raise RuntimeError("there is no wandb-core")


if __name__ == "__main__":
    directory, *names = sys.argv[1:]
    at_once(main, Path(directory), names, n_at_a_time=4)  # half of the time is spent in waiting

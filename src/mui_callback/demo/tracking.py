"""The demo's W&B run: on this machine only, unless the user asks for something else."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any


@contextmanager
def wandb_run(output_dir: Path) -> Iterator[Any]:
    """The active W&B run that the Trainer and `MUICallback` log to; None where wandb is not installed.

    It is offline unless the environment has a ``WANDB_MODE``.
    """
    if find_spec("wandb") is None:
        yield None
        return
    import wandb

    run = wandb.init(
        project="mui-demo",
        dir=output_dir,
        mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
        settings=wandb.Settings(silent=True, console="off"),
    )
    try:
        yield run
    finally:
        run.finish()


def command_line(name: str) -> str:
    """How to call a command from here, where its environment may not be the active one."""
    if which(name):
        return name
    command, here = Path(sys.executable).with_name(name), Path.cwd()
    return str(command.relative_to(here) if command.is_relative_to(here) else command)

"""Training runs that log to offline W&B runs; each in a process of its own, since W&B keeps its settings."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import wandb

from forked import at_once
from integrations import INTEGRATIONS, Watch
from mui_callback import MUICallback, ProbeSet
from test_alerts import ruin
from tiny_samples import make_samples
from training import STEPS, make_trainer


def in_transformers(output_dir: Path, reporter: str) -> None:
    if reporter == "mine":  # a run that the user started, and no reporter of the Trainer's
        wandb.init(project="mine", dir=output_dir)
    callbacks = [] if reporter == "plain" else [MUICallback(ProbeSet({"a": make_samples(7)}), every=3)]
    report_to = "none" if reporter == "mine" else ["wandb"]
    make_trainer(output_dir, callbacks, report_to=report_to, logging_steps=2).train()


def with_a_table(output_dir: Path) -> None:
    callback = MUICallback(ProbeSet({"a": make_samples(7)}), every=3, pictures="end", tables=True)
    make_trainer(output_dir, [callback], report_to=["wandb"]).train()


def in_lightning(output_dir: Path) -> None:
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import WandbLogger
    from torch.utils.data import DataLoader

    from test_lightning import Module
    from training import rows

    pl.Trainer(
        max_steps=STEPS,
        logger=WandbLogger(save_dir=output_dir, offline=True),
        log_every_n_steps=1,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=output_dir,
        callbacks=[MUICallback(ProbeSet({"a": make_samples(7)}), every=3)],
    ).fit(Module(), DataLoader(rows(), batch_size=4))


def in_a_loop(output_dir: Path, logs: str) -> None:
    run = wandb.init(project="loop", dir=output_dir)
    watch = Watch({"every": 3})
    watch.tracker = "wandb"

    def on_step(step: int) -> None:  # before the step is done, so from 0 on, as an enumerated loop counts
        values = {"loss": float(step)}
        if logs == "steps":
            run.log(values, step=step)
        elif logs == "rows":
            run.log(values)

    INTEGRATIONS["torch"].fit(output_dir, watch, on_step=on_step)
    run.finish()


def ruined(output_dir: Path) -> None:
    with wandb.init(project="ruin", dir=output_dir):
        ruin(output_dir, tracker="wandb")


WAYS: dict[str, Callable[[Path], None]] = {
    "trainer": partial(in_transformers, reporter="trainer"),
    "plain": partial(in_transformers, reporter="plain"),
    "mine": partial(in_transformers, reporter="mine"),
    "table": with_a_table,
    "lightning": in_lightning,
    "ruin": ruined,
    **{f"loop-{logs}": partial(in_a_loop, logs=logs) for logs in ("nothing", "steps", "rows")},
}


def main(output_dir: Path, way: str) -> None:
    output_dir.mkdir()
    os.environ["WANDB_DIR"] = str(output_dir)
    WAYS[way](output_dir)
    wandb.finish()


if __name__ == "__main__":
    at_once(main, Path(sys.argv[1]), WAYS)

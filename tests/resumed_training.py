"""Trainings that crash after 7 of 8 steps and go on from a checkpoint after 3, in the same W&B run, in every way."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import wandb
from transformers import AutoModelForCausalLM

from forked import at_once
from integrations import Watch, failing, make_model, probe_set
from mui_callback import MUICallback, MUIMonitor
from mui_callback.sinks.wandb import WandbSink
from test_resume import Crash, Crashed, hf_trainer
from training import STEPS


def in_transformers(output_dir: Path) -> None:
    options: dict[str, Any] = {"report_to": ["wandb", "tensorboard", "trackio"], "run_name": "transformers"}
    with suppress(Crashed):
        hf_trainer(output_dir, [MUICallback(probe_set(), every=2), Crash(7)], **options).train()
    wandb.finish(exit_code=1)
    checkpoint = output_dir / "checkpoint-3"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    trainer = hf_trainer(output_dir, [MUICallback(probe_set(), every=2)], model, **options)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    wandb.finish()


def in_lightning(output_dir: Path) -> None:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger, WandbLogger
    from torch.utils.data import DataLoader

    from test_lightning import Module
    from training import rows

    class Crashing(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            failing(7, Crashed())(trainer.global_step)

    def fit(*callbacks: Any, version: int, **options: Any) -> None:
        checkpoints = ModelCheckpoint(output_dir, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        logger = WandbLogger(save_dir=output_dir, project="resumed", id="lightning", resume="allow")
        trainer = pl.Trainer(
            max_steps=STEPS,
            logger=[logger, CSVLogger(output_dir, version=version)],
            log_every_n_steps=1,
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=output_dir,
            callbacks=[MUICallback(probe_set(), every=2), checkpoints, *callbacks],
        )
        trainer.fit(Module(), DataLoader(rows(), batch_size=4), **options)

    with suppress(Crashed):
        fit(Crashing(), version=0)
    wandb.finish(exit_code=1)
    fit(version=1, ckpt_path=output_dir / "step=3.ckpt", weights_only=False)
    wandb.finish()


def in_a_loop(output_dir: Path) -> None:
    """Without training: what is logged is the same."""
    watch, state = Watch({"every": 2}), None
    for begin, end in ((0, 7), (3, STEPS)):
        time.sleep(1.1 * bool(state))  # the name of an offline run has the second that it began in
        with wandb.init(project="resumed", id="loop", resume="allow", dir=output_dir) as run:
            monitor = MUIMonitor(
                make_model(),
                probe_set(),
                output_dir=output_dir,
                state=state,
                tracker=WandbSink("step"),
                **watch.options,
            )
            for step in range(begin + 1, end + 1):
                monitor.step(step)
                run.log({"loss": 1.0, "step": step})
                if begin == 0 and step == 3:
                    state = monitor.state_dict()
            if end == STEPS:
                monitor.close()


WAYS = {way.__name__: way for way in (in_transformers, in_lightning, in_a_loop)}


def main(output_dir: Path, way: str) -> None:
    """The folder that all ways have in common is named for what W&B is: online, or offline."""
    together = output_dir.parent
    together.mkdir(exist_ok=True)
    output_dir.mkdir()
    os.environ.update(
        WANDB_MODE=together.name,
        WANDB_RUN_ID="in_transformers",
        WANDB_RESUME="allow",
        WANDB_DIR=str(together),
        WANDB_SILENT="true",
        TENSORBOARD_LOGGING_DIR=str(together / "tensorboard"),
        TRACKIO_DIR=str(together / "trackio"),
        TRACKIO_AUTO_LOG_CPU="0",
    )
    WAYS[way.rpartition("/")[2]](output_dir)


if __name__ == "__main__":
    directory, *names = sys.argv[1:]
    at_once(main, Path(directory), names)

"""Training runs that log to several trackers at once; each in a process of its own, since they keep their settings."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import mlflow
import torch.utils.tensorboard  # noqa: F401 - here, or each of them would import it

from forked import at_once
from integrations import make_model
from mui_callback import MUICallback, MUIMonitor, ProbeSet
from tiny_samples import make_samples
from training import STEPS, make_trainer


def callback() -> MUICallback:
    return MUICallback(ProbeSet({"a": make_samples(7)}), every=3, on_error="raise")


def in_transformers(output_dir: Path) -> None:
    report_to = ["tensorboard", "mlflow", "trackio"]
    make_trainer(output_dir, [callback()], report_to=report_to, logging_steps=2).train()


def in_lightning(output_dir: Path) -> None:
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger
    from torch.utils.data import DataLoader

    from test_lightning import Module
    from training import rows

    pl.Trainer(
        max_steps=STEPS,
        logger=[
            CSVLogger(output_dir),
            TensorBoardLogger(output_dir),
            MLFlowLogger(tracking_uri=f"file:{output_dir}/mlruns"),
        ],
        log_every_n_steps=1,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=output_dir,
        callbacks=[callback()],
    ).fit(Module(), DataLoader(rows(), batch_size=4))


def in_a_loop(output_dir: Path) -> None:
    import trackio
    from lightning.fabric.loggers import CSVLogger
    from torch.utils.tensorboard import SummaryWriter

    trackio.init(project="huggingface", embed=False)
    model, probe_set = make_model(), ProbeSet({"über?": make_samples(7)})
    with mlflow.start_run(), SummaryWriter(output_dir / "tensorboard") as writer:
        logger = CSVLogger(output_dir)
        tracker = ["trackio", "mlflow", writer, logger]
        with MUIMonitor(model, probe_set, output_dir=output_dir, tracker=tracker, every=3, on_error="raise") as monitor:
            for step in range(1, STEPS + 1):
                monitor.step(step)
        logger.finalize("success")
    trackio.finish()


WAYS: dict[str, Callable[[Path], None]] = {
    "transformers": in_transformers,
    "lightning": in_lightning,
    "loop": in_a_loop,
}


def main(output_dir: Path, way: str) -> None:
    output_dir.mkdir()
    os.environ.update(
        MLFLOW_ALLOW_FILE_STORE="true",
        MLFLOW_TRACKING_URI=f"file:{output_dir}/mlruns",
        TENSORBOARD_LOGGING_DIR=str(output_dir / "tensorboard"),
        TRACKIO_DIR=str(output_dir / "trackio"),
        TRACKIO_AUTO_LOG_CPU="0",
    )
    WAYS[way](output_dir)
    mlflow.flush_async_logging()


if __name__ == "__main__":
    at_once(main, Path(sys.argv[1]), WAYS)

"""Where a `transformers.Trainer` reports to, as sinks."""

from __future__ import annotations

from functools import partial
from typing import Any

from mui_callback.sinks.base import Sink
from mui_callback.sinks.mlflow import MLflowSink
from mui_callback.sinks.step_keys import HF_STEP_KEY
from mui_callback.sinks.tensorboard import TensorBoardSink
from mui_callback.sinks.trackio import TrackioSink
from mui_callback.sinks.wandb import WandbSink


def reporter_sinks(trainer: Any) -> tuple[Sink, ...]:
    """Sinks for the runs that are active when a point is written, of W&B, Trackio and MLflow, whoever started them, and
    for the writer of the Trainer's reporter to TensorBoard.

    Args:
        trainer: a Trainer, or None where it is not known.
    """
    handler = getattr(trainer, "callback_handler", None)
    return (
        WandbSink(HF_STEP_KEY),
        TensorBoardSink(partial(_summary_writer, handler)),
        TrackioSink(HF_STEP_KEY),
        MLflowSink(),
    )


def _summary_writer(handler: Any) -> Any:
    """That of the reporter, which has one from the beginning of training to its end."""
    callbacks = getattr(handler, "callbacks", ())
    return next((writer for one in callbacks if (writer := getattr(one, "tb_writer", None)) is not None), None)

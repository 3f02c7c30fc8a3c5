"""Whatever people log to, as sinks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from mui_callback.sinks.base import Sink
from mui_callback.sinks.logger import LoggerSink
from mui_callback.sinks.mlflow import MLflowSink
from mui_callback.sinks.tensorboard import TensorBoardSink
from mui_callback.sinks.trackio import TrackioSink
from mui_callback.sinks.wandb import WandbSink

Named = Literal["wandb", "trackio", "mlflow"]

_NAMED: dict[str, Callable[[], Sink]] = {"wandb": WandbSink, "trackio": TrackioSink, "mlflow": MLflowSink}


def as_sinks(tracker: Any) -> tuple[Sink, ...]:
    """The sinks of what is given as `tracker`.

    Args:
        tracker: ``"wandb"``, ``"trackio"`` or ``"mlflow"`` for the active run of it; a ``SummaryWriter``; a logger of
            Lightning or Fabric, such as ``CSVLogger("run")``; any sink; a list of these; None for none.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(tracker, list | tuple):
        return tuple(sink for one in tracker for sink in as_sinks(one))
    return () if tracker is None else (_as_sink(tracker),)


def _as_sink(tracker: Any) -> Sink:
    if isinstance(tracker, str) and tracker in _NAMED:
        return _NAMED[tracker]()
    if not isinstance(tracker, str | type):
        if hasattr(tracker, "add_scalar"):
            return TensorBoardSink(lambda: tracker)
        if hasattr(tracker, "log_metrics"):
            return LoggerSink(tracker)
        if hasattr(tracker, "write"):
            sink: Sink = tracker
            return sink
    raise ValueError(
        f"tracker: expected {', '.join(map(repr, _NAMED))}, a SummaryWriter, a logger with log_metrics, a sink, a list "
        f"of these or None, got {tracker!r:.80}"
    )

"""The events of `lightning.Trainer` and of `pytorch_lightning.Trainer`, which are the same."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mui_callback.forgiving import warn
from mui_callback.sinks.logger import LoggerSink
from mui_callback.trainers.base import Training, TrainingEvents
from mui_callback.trainers.lightning_eval_data import eval_probe_set


class LightningEvents(TrainingEvents):
    """Every event brings the Trainer and the LightningModule."""

    _restored: Mapping[str, Any] | None = None
    _loggers: tuple[LoggerSink, ...] = ()
    _last_step = 0

    @property
    def state_key(self) -> str:
        """Under which name a checkpoint holds the state: fixed, whatever is derived from this class."""
        return "MUICallback"

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds: numbers, strings, lists and dicts."""
        return self._state()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint holds, when training begins."""
        self._restored = state_dict or None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the expert layers and the samples; probe at step 0. Sanity checks are over."""
        self._last_step = trainer.global_step
        self._loggers = tuple(LoggerSink(logger) for logger in trainer.loggers)
        # A checkpoint is also loaded to validate, and says nothing then of the training that begins here.
        state, self._restored = self._restored, None
        if not state or trainer.global_step == 0 or state.get("step", 0) > trainer.global_step:
            state = None
        self._move_loggers(trainer)
        with trainer.precision_plugin.forward_context():
            self._begin(
                Training(
                    model=pl_module,
                    step=trainer.global_step,
                    output_dir=_output_dir(trainer),
                    trackers=self._loggers,
                    tokenizer=_tokenizer(pl_module, trainer.datamodule),
                    eval_data=partial(eval_probe_set, trainer),
                    state=state,
                )
            )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """Probe if it is due, once the gradients of all micro-batches have made a step."""
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self._move_loggers(trainer)
            self._step_in_precision(trainer, last=_is_last(trainer, pl_module))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Probe beside the Trainer's evaluation; sanity checks come before `on_train_start`, so nothing happens."""
        self._step_in_precision(trainer, evaluated=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Probe the last step if nobody knew that it was the last; close the sinks and let go of the model."""
        self._step_in_precision(trainer, last=True)
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close the sinks and let go of the model."""
        self._end()

    def _step_in_precision(self, trainer: Any, *, evaluated: bool = False, last: bool = False) -> None:
        with trainer.precision_plugin.forward_context():  # as training_step has it
            self._step(trainer.global_step, evaluated=evaluated, last=last)

    def _move_loggers(self, trainer: Any) -> None:
        """To where the loss of this step is logged: Lightning counts there from 0, in batches that made a step."""
        for sink in self._loggers:
            sink.step = trainer.fit_loop.epoch_loop._batches_that_stepped


def _is_last(trainer: Any, pl_module: Any) -> bool:
    """Whether training is known to end after this step, while the weights are those that it made."""
    if not pl_module.automatic_optimization:  # several optimizers may count several steps for a batch
        return False
    try:
        n_steps = trainer.estimated_stepping_batches
    except Exception:  # where the accumulation changes from epoch to epoch, Lightning does not know
        return False
    return bool(0 < n_steps <= trainer.global_step)


def _output_dir(trainer: Any) -> Path:
    root = str(trainer.default_root_dir)
    if "://" in root:
        warn(f"MUI: the record goes to the current directory, as it cannot be written to {root}")
        return Path()
    return Path(root)


def _tokenizer(*holders: Any) -> Any:
    return next((found for holder in holders if (found := getattr(holder, "tokenizer", None)) is not None), None)

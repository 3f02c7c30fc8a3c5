"""`MUICallback`: the one line that a user adds to a trainer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from mui_callback.errors import ProbeSetError

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError("MUICallback needs transformers: pip install 'mui-callback[hf]'") from error

from mui_callback.monitor import Monitor, OnError
from mui_callback.probe.encode import Tokenizer
from mui_callback.probe.model_config import decoder_start
from mui_callback.probe.probe_set import ProbeSet
from mui_callback.probe.run import MUIProbe
from mui_callback.schedule import Schedule
from mui_callback.settings import ProbeSettings
from mui_callback.sinks.base import RunDescription, Sink
from mui_callback.sinks.jsonl import JsonlSink
from mui_callback.sinks.wandb import WandbSink
from mui_callback.trainers.hf_eval_data import calling_trainer, eval_probe_set

logger = logging.getLogger(__name__)

RECORD_NAME = "mui.jsonl"
"""Name of the record in the output directory."""
STEP_KEY = "train/global_step"
"""The x axis that the Trainer's own W&B reporter uses."""


class MUICallback(TrainerCallback):
    """Measures expert utilization while a `transformers.Trainer` trains an MoE language model.

        trainer = Trainer(..., callbacks=[MUICallback()])

    Every so many optimizer steps, and before the first and after the last, the model is frozen and a held-out probe
    set run through it. The results go to the active W&B run, on the x axis of the loss, and to ``mui.jsonl`` in the
    output directory. Training is the same to the bit as without the callback.

    Args:
        probe_set: the samples. Without it, the first `eval_samples` of each of the Trainer's eval data sets are used;
            without eval data, the built-in set through the Trainer's tokenizer (``processing_class``).
        every: optimizer steps between probes.
        at_start: probe before the first step.
        at_end: probe after the last step.
        tokenizer: for samples that are text; without it, the Trainer's ``processing_class``.
        sinks: where points go besides W&B and the record.
        eval_samples: samples taken of each eval data set where no probe set is given.
        on_error: ``"warn"``: a probe that fails is recorded as failed, with a warning, and training goes on.
            ``"raise"``: its exception ends training.
        top_fraction: see `ProbeSettings`, as the four that follow.
        key_expert_frequency: η_expert.
        batch_tokens: positions in a forward pass.
        max_length: tokens that longer samples are cut to.
        dense: also probe the MLP of each layer without experts, as a layer of one expert.

    Raises:
        ValueError: an argument is out of its range.

    At the begin of training, before the first step:
        NoExpertsError: the model has no MoE layer, and `dense` is off.
        UnsupportedModelError: its experts or its head cannot be read.
        ProbeSetError: there is nothing to probe with, or it does not fit the model.
    """

    def __init__(
        self,
        probe_set: ProbeSet | None = None,
        *,
        every: int = 500,
        at_start: bool = True,
        at_end: bool = True,
        tokenizer: Tokenizer | None = None,
        sinks: Sequence[Sink] = (),
        eval_samples: int = 64,
        on_error: OnError = "warn",
        top_fraction: float = ProbeSettings.top_fraction,
        key_expert_frequency: float = ProbeSettings.key_expert_frequency,
        batch_tokens: int = ProbeSettings.batch_tokens,
        max_length: int | None = ProbeSettings.max_length,
        dense: bool = ProbeSettings.dense,
    ) -> None:
        self.probe_set = probe_set
        self.schedule = Schedule(every, at_start=at_start, at_end=at_end)
        self.tokenizer = tokenizer
        self.sinks = tuple(sinks)
        self.eval_samples = eval_samples
        self.on_error: OnError = on_error
        if on_error not in get_args(OnError):
            raise ValueError(f"on_error: expected 'warn' or 'raise', got {on_error!r}")
        if eval_samples < 1:
            raise ValueError(f"eval_samples: expected a positive number of samples, got {eval_samples!r}")
        self.settings = ProbeSettings(top_fraction, key_expert_frequency, max_length, batch_tokens, dense)
        self._monitor: Monitor | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Find the expert layers and the samples; probe at step 0."""
        tokenizer = self.tokenizer or processing_class
        probe_set = self._find_probe_set(model, tokenizer)
        probe = MUIProbe(model, probe_set, tokenizer=tokenizer, **asdict(self.settings))
        sinks: tuple[Sink, ...] = ()
        if state.is_world_process_zero:
            sinks = (JsonlSink(Path(args.output_dir) / RECORD_NAME), WandbSink(STEP_KEY), *self.sinks)
        run = RunDescription(probe_set.task_names, probe_set.fingerprint, probe.settings, probe.layout)
        self._monitor = Monitor(probe.measure, self.schedule, sinks, run, on_error=self.on_error)
        logger.info("MUI: probing %r in %r every %d steps", probe_set, probe.layout, self.schedule.every)
        if state.global_step == 0:
            self._monitor.step(0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Probe if it is due. The last probe belongs here: trackers may be closed when training has ended."""
        self._step(state, is_last=state.global_step >= state.max_steps or control.should_training_stop)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Probe if training was told to stop here: afterwards the Trainer may load other weights, its best ones."""
        if control.should_training_stop:
            self._step(state, is_last=True)

    on_save = on_epoch_end = on_evaluate

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Probe the last step if no other event came after it; close the sinks and let go of the model."""
        has_other_weights = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if not has_other_weights:
            self._step(state, is_last=True)
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None

    def _step(self, state: TrainerState, *, is_last: bool) -> None:
        if self._monitor is not None:
            self._monitor.step(state.global_step, is_last=is_last)

    def _find_probe_set(self, model: Any, tokenizer: Any) -> ProbeSet:
        if self.probe_set is not None:
            return self.probe_set
        trainer = calling_trainer()
        try:
            probe_set = eval_probe_set(trainer, self.eval_samples)
        except Exception as error:  # a data set or a collator of the user's own may raise anything
            if tokenizer is None:
                raise
            warnings.warn(f"The eval data cannot be probed ({error}); using the built-in probe set.", stacklevel=2)
            probe_set = None
        if probe_set is not None:
            return probe_set
        if tokenizer is None:
            raise ProbeSetError(
                "MUICallback has nothing to probe with: the Trainer has neither eval data nor a tokenizer. "
                "Pass a probe set, MUICallback(ProbeSet.from_jsonl({'gsm8k': 'gsm8k.jsonl'}), tokenizer=tokenizer), "
                "or give the Trainer an eval_dataset or a processing_class."
            )
        return ProbeSet.builtin(only_with_prompt=decoder_start(model) is not None)

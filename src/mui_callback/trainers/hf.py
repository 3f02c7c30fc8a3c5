"""The events of `transformers.Trainer`, and of trainers made of it, such as TRL's."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from mui_callback.trainers.base import Training, TrainingEvents
from mui_callback.trainers.hf_caller import calling_trainer, resumed_checkpoint
from mui_callback.trainers.hf_eval_data import eval_probe_set
from mui_callback.trainers.hf_reporters import reporter_sinks
from mui_callback.trainers.hf_resume import warn_if_experts_are_not_restored
from mui_callback.trainers.hf_state import read_state, write_state


class HFEvents(TrainingEvents):
    """Every event brings the arguments, the state and the control of the Trainer, never the Trainer itself."""

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None, **kwargs: Any
    ) -> None:
        """Find the expert layers and the samples; probe at step 0."""
        checkpoint = resumed_checkpoint() if state.global_step > 0 else None
        if state.is_world_process_zero:
            warn_if_experts_are_not_restored(model, checkpoint)
        trainer = calling_trainer()
        self._begin(
            Training(
                model=model,
                step=state.global_step,
                output_dir=Path(args.output_dir),
                trackers=reporter_sinks(trainer),
                tokenizer=getattr(processing_class, "tokenizer", processing_class),  # a processor for images has one
                eval_data=partial(eval_probe_set, trainer),
                state=read_state(checkpoint) if state.is_world_process_zero else None,
            )
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Probe if it is due. The last probe belongs here: trackers may be closed when training has ended."""
        self._step(state.global_step, last=state.global_step >= state.max_steps or control.should_training_stop)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Probe beside the Trainer's evaluation. If training was told to stop here, the Trainer may load other weights
        afterwards, its best ones."""
        self._step(state.global_step, evaluated=True, last=control.should_training_stop)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Probe if training was told to stop here; put the state into the checkpoint."""
        self.on_epoch_end(args, state, control)
        if state.is_world_process_zero:
            write_state(Path(args.output_dir) / f"checkpoint-{state.global_step}", self._state())

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Probe if training was told to stop here."""
        if control.should_training_stop:
            self._step(state.global_step, last=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Probe the last step if no other event came after it; close the sinks and let go of the model."""
        has_other_weights = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if not has_other_weights:
            self._step(state.global_step, last=True)
        self._end()

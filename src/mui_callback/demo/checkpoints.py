"""The checkpoints that the demo leaves, for a study of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_PREFIX = "checkpoint-"


class Checkpoints(TrainerCallback):
    """The model with its tokenizer, before the first step, every so many steps and after the last.

    The Trainer's own are not there before the first step, and hold what only a resumed run needs.

    Args:
        directory: for a directory ``checkpoint-STEP`` of each; those of an earlier run are removed.
        tokenizer: of the model.
        every: steps.
    """

    def __init__(self, directory: Path, tokenizer: Any, *, every: int) -> None:
        self._directory = directory
        self._tokenizer = tokenizer
        self._every = every

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Save the random model."""
        for earlier in self._directory.glob(f"{_PREFIX}*"):
            shutil.rmtree(earlier)
        self._save(model, state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Save one that is due."""
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self._save(model, state.global_step)

    def _save(self, model: Any, step: int) -> None:
        for part in (model, self._tokenizer):
            part.save_pretrained(self._directory / f"{_PREFIX}{step}")

"""`MUICallback`: the one line that a user adds to a trainer."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from mui_callback.errors import ProbeSetError
from mui_callback.monitoring.run_monitor import OnError, RunMonitor, check_on_error
from mui_callback.monitoring.schedule import Every, Schedule
from mui_callback.probe.encode import Tokenizer
from mui_callback.probe.model_config import decoder_start
from mui_callback.probe.probe_set import ProbeSet
from mui_callback.settings import ProbeSettings
from mui_callback.sinks.base import Sink
from mui_callback.trainers.base import Training
from mui_callback.trainers.bases import TrainerClasses, plain_class, with_trainer_classes
from mui_callback.trainers.hf import HFEvents
from mui_callback.trainers.language_model import find_language_model, named_model
from mui_callback.trainers.lightning import LightningEvents


class MUICallback(HFEvents, LightningEvents, TrainerClasses):
    """Measures expert utilization while a trainer trains an MoE language model.

        trainer = Trainer(..., callbacks=[MUICallback()])

    for the `Trainer` of transformers (and those made of it, as TRL's), of ``lightning`` and of ``pytorch_lightning``.
    At the steps of its schedule the model is frozen and a held-out probe set run through it. The results go where the
    trainer logs to, on the x axis of the loss, and to ``mui.jsonl`` in its output directory. Training is the same to
    the bit as without the callback.

    Args:
        probe_set: the samples. Without it, the first `eval_samples` of each of the trainer's eval data sets are used;
            without eval data, the built-in set through the trainer's tokenizer.
        every: optimizer steps between probes; ``"auto"`` for as many as `budget` allows; None for no regular ones.
        budget: with ``every="auto"``, time spent in probes as share of the time spent in training.
        at: steps to probe besides.
        warmup: also probe after 1, 2, 4, 8, … steps, up to `every` (up to 256 without a fixed interval).
        at_start: also probe before the first step.
        at_end: also probe after the last step.
        on_evaluation: also probe whenever the trainer evaluates.
        tokenizer: for samples that are text; without it, that of the trainer (``processing_class`` in transformers,
            the attribute ``tokenizer`` of the LightningModule or its data module).
        sinks: where points go besides; a `MemorySink`, say.
        eval_samples: samples taken of each eval data set where no probe set is given.
        moe_model: the model to probe, or its path in what the trainer trains (``"student"``), where that holds more
            than one language model with experts.
        on_error: ``"warn"``: a probe that fails is recorded as failed, with a warning, and training goes on; after
            three in a row no more are made. ``"raise"``: its exception ends training, in every process.
        top_fraction: see `ProbeSettings`, as the four that follow.
        key_expert_frequency: η_expert.
        batch_tokens: positions in a forward pass; halved if memory runs out.
        max_length: tokens that longer samples are cut to.
        dense: also probe the MLP of each layer without experts, as a layer of one expert.

    Raises:
        ValueError: an argument is out of its range.

    At the begin of training, before the first step:
        NoExpertsError: the model has no MoE layer, and `dense` is off.
        UnsupportedModelError: its experts or its head cannot be read, or it is not clear which model is meant.
        ProbeSetError: there is nothing to probe with, or it does not fit the model.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> MUICallback:
        """Of the class that the trainers which are imported by now want."""
        instance: MUICallback = object.__new__(with_trainer_classes(cls))
        return instance

    def __init__(
        self,
        probe_set: ProbeSet | None = None,
        *,
        every: Every = "auto",
        budget: float = Schedule.budget,
        at: Collection[int] = (),
        warmup: bool = False,
        at_start: bool = True,
        at_end: bool = True,
        on_evaluation: bool = False,
        tokenizer: Tokenizer | None = None,
        sinks: Sequence[Sink] = (),
        eval_samples: int = 64,
        moe_model: nn.Module | str | None = None,
        on_error: OnError = "warn",
        top_fraction: float = ProbeSettings.top_fraction,
        key_expert_frequency: float = ProbeSettings.key_expert_frequency,
        batch_tokens: int = ProbeSettings.batch_tokens,
        max_length: int | None = ProbeSettings.max_length,
        dense: bool = ProbeSettings.dense,
    ) -> None:
        check_on_error(on_error)
        if eval_samples < 1:
            raise ValueError(f"eval_samples: expected a positive number of samples, got {eval_samples!r}")
        self.probe_set = probe_set
        self.schedule = Schedule(
            every, budget, at, warmup=warmup, at_start=at_start, at_end=at_end, on_evaluation=on_evaluation
        )
        self.settings = ProbeSettings(top_fraction, key_expert_frequency, max_length, batch_tokens, dense)
        self.tokenizer = tokenizer
        self.sinks = tuple(sinks)
        self.eval_samples = eval_samples
        self.moe_model = moe_model
        self.on_error: OnError = on_error
        self._monitor: RunMonitor | None = None

    def __getattr__(self, name: str) -> Any:
        """An event that is not known yet: of a trainer that was imported after this was made."""
        wanted = with_trainer_classes(plain_class(type(self)))
        if type(self) is wanted:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self.__class__ = wanted
        return getattr(self, name)

    def __reduce__(self) -> tuple[Any, ...]:
        own = plain_class(type(self))
        return own.__new__, (own,), self.__dict__

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """The one event that both kinds of trainer name alike, with three arguments and with two."""
        handler = HFEvents.on_train_end if len(args) == 3 else LightningEvents.on_train_end
        handler(self, *args, **kwargs)

    def _begin(self, training: Training) -> None:
        self._end()  # of a training that was interrupted where no event tells
        model = self._find_model(training)
        tokenizer = self.tokenizer or training.tokenizer
        self._monitor = RunMonitor(
            model,
            self._find_probe_set(model, tokenizer, training),
            tokenizer=tokenizer,
            settings=self.settings,
            schedule=self.schedule,
            on_error=self.on_error,
            output_dir=training.output_dir,
            sinks=[*training.trackers, *self.sinks],
            start_step=training.step,
            state=training.state,
        )

    def _step(self, step: int, *, evaluated: bool = False, last: bool = False) -> None:
        if self._monitor is not None:
            self._monitor.step(step, evaluated=evaluated, last=last)

    def _end(self) -> None:
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            monitor.close()

    def _state(self) -> dict[str, Any]:
        return self._monitor.state_dict() if self._monitor is not None else {}

    def _find_model(self, training: Training) -> nn.Module:
        if isinstance(self.moe_model, nn.Module):
            return self.moe_model
        if self.moe_model is not None:
            return named_model(training.model, self.moe_model)
        if training.is_language_model:
            return training.model
        return find_language_model(training.model, dense=self.settings.dense)

    def _find_probe_set(self, model: nn.Module, tokenizer: Tokenizer | None, training: Training) -> ProbeSet:
        if self.probe_set is not None:
            return self.probe_set
        try:
            probe_set = training.eval_data(self.eval_samples)
        except Exception as error:  # a data set or a collator of the user's own may raise anything
            if tokenizer is None:
                raise
            warnings.warn(f"The eval data cannot be probed ({error}); using the built-in probe set.", stacklevel=2)
            probe_set = None
        if probe_set is not None:
            return probe_set
        if tokenizer is None:
            raise ProbeSetError(
                "MUICallback has nothing to probe with: the trainer has neither eval data nor a tokenizer. "
                "Pass a probe set, MUICallback(ProbeSet.from_jsonl({'gsm8k': 'gsm8k.jsonl'}), tokenizer=tokenizer), "
                "or give the trainer eval data or a tokenizer."
            )
        return ProbeSet.builtin(only_with_prompt=decoder_start(model) is not None)

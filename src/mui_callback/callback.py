"""`MUICallback`: the one line that a user adds to a trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from mui_callback.benchmarks.given import Benchmarks
from mui_callback.forgiving import described, warn
from mui_callback.metrics.catalogue import Detail
from mui_callback.monitoring.alert_rule import AlertRule
from mui_callback.monitoring.asked import Ablate, Asked
from mui_callback.monitoring.benchmark_runs import BenchmarksEvery
from mui_callback.monitoring.run_monitor import OnError, RunMonitor, check_on_error, check_sinks
from mui_callback.monitoring.schedule import Every, Schedule
from mui_callback.parallel.processes import Processes
from mui_callback.parallel.weights import settle_roots
from mui_callback.pictures.scene import Pictures, check_pictures
from mui_callback.pictures.sink import pictures_at
from mui_callback.probe.default import builtin_for, check_probe_set
from mui_callback.probe.encode import Tokenizer
from mui_callback.probe.probe_set import ProbeSet
from mui_callback.probe.run import MUIProbe
from mui_callback.rules import Rules
from mui_callback.settings import Activation, Alignment, ProbeSettings
from mui_callback.sinks.base import Sink
from mui_callback.trainers.base import Training
from mui_callback.trainers.callback_classes import TrainerClasses, plain_class, with_trainer_classes
from mui_callback.trainers.hf import HFEvents
from mui_callback.trainers.language_model import find_language_model, named_model
from mui_callback.trainers.lightning import LightningEvents

_HINT = (
    "the trainer has neither eval data nor a tokenizer. Pass a probe set, "
    "MUICallback(ProbeSet.from_jsonl({'gsm8k': 'gsm8k.jsonl'}), tokenizer=tokenizer), "
    "or give the trainer eval data or a tokenizer."
)


class MUICallback(HFEvents, LightningEvents, TrainerClasses):
    """Measures expert utilization while a trainer trains an MoE language model.

        trainer = Trainer(..., callbacks=[MUICallback()])

    for the `Trainer` of transformers (and those made of it, as TRL's), of ``lightning`` and of ``pytorch_lightning``.
    At the steps of its schedule the model is frozen and a held-out probe set run through it. The results go where the
    trainer reports to (W&B, TensorBoard, Trackio, MLflow; in Lightning, to every logger of the trainer), on the x axis
    of the loss, and to ``mui.jsonl`` in the output directory. Training is the same to the bit as without the callback.

    Args:
        probe_set: the samples. Without it, the first `eval_samples` of each of the trainer's eval data sets are used;
            without eval data, or with a warning where they cannot be probed, the built-in set through the trainer's
            tokenizer.
        every: optimizer steps between probes; ``"auto"`` for as many as `budget` allows; None for no regular ones.
        budget: with ``every="auto"``, time spent in probes, and in all that comes with them, as share of the time spent
            in training.
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
            three in a row no more are made. ``"raise"``: its exception ends training, in every process. Where the model
            itself fails in a forward pass in which processes exchange tensors, training ends in any case.
        rules: which contributions make key neurons, see `ProbeSettings`, as the parameters that follow.
        key_expert_frequency: η_expert.
        batch_tokens: positions in a forward pass; halved if memory runs out.
        max_length: tokens that longer samples are cut to.
        dense: also probe the MLP of each layer without experts, as a layer of one expert.
        activation: ``"gate"`` leaves out the up factor.
        alignment: ``"same"`` scores a position against the token at it.
        benchmarks: run on the live model and logged next to the probe: a callable ``(model, step) -> {name: number}``,
            a JSONL file of samples with choices, a task of lm-evaluation-harness, or several; see
            `mui_callback.benchmarks.given.as_benchmarks`.
        benchmarks_every: optimizer steps between them, with a probe each time; ``"probe"``: with each probe.
        performance: by task (None for all pooled) the score of a benchmark that is its performance in phases, with
            ``-`` before it where lower is better. Without it, a score with the name of the task; or else choice
            accuracy or the negative loss.
        phase_window: points that a phase is called from; see `mui_callback.metrics.phases`.
        phase_level: of the intervals of both trends.
        detail: ``"layers"``: also log MUI, shared share, concentration and dead experts of each layer, in at most
            256 keys.
        alerts: False for no alerts; an `AlertRule` for other thresholds; see `mui_callback.monitoring.alert_rule`.
        ablate: ``"neurons"`` (or True) or ``"experts"``: after the last step, log the change of each task's loss
            without its key ones, and without as many random ones.
        pictures: in W&B, pictures of each probe, drawn beside the training; ``"end"``: of the last one only; False:
            none.
        tables: also log a table of the experts to W&B, at the end.

    Raises:
        ValueError: an argument is out of its range.

    At the beginning of training, before the first step:
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
        every: Every = Schedule.every,
        budget: float = Schedule.budget,
        at: Iterable[int] = Schedule.at,
        warmup: bool = Schedule.warmup,
        at_start: bool = Schedule.at_start,
        at_end: bool = Schedule.at_end,
        on_evaluation: bool = Schedule.on_evaluation,
        tokenizer: Tokenizer | None = None,
        sinks: Sequence[Sink] = (),
        eval_samples: int = 64,
        moe_model: nn.Module | str | None = None,
        on_error: OnError = "warn",
        rules: Rules = ProbeSettings.rules,
        key_expert_frequency: float = ProbeSettings.key_expert_frequency,
        batch_tokens: int = ProbeSettings.batch_tokens,
        max_length: int | None = ProbeSettings.max_length,
        dense: bool = ProbeSettings.dense,
        activation: Activation = ProbeSettings.activation,
        alignment: Alignment = ProbeSettings.alignment,
        benchmarks: Benchmarks = (),
        benchmarks_every: BenchmarksEvery = Asked.benchmarks_every,
        performance: Mapping[str | None, str] | None = None,
        phase_window: int = Asked.phase_window,
        phase_level: float = Asked.phase_level,
        detail: Detail = Asked.detail,
        alerts: AlertRule | bool = Asked.alerts,
        ablate: Ablate = Asked.ablate,
        pictures: Pictures = True,
        tables: bool = False,
    ) -> None:
        check_on_error(on_error)
        check_sinks(sinks)
        check_probe_set(probe_set)
        check_pictures(pictures, tables)
        if eval_samples < 1:
            raise ValueError(f"eval_samples: expected a positive number of samples, got {eval_samples!r}")
        self.probe_set = probe_set
        self.schedule = Schedule(
            every, budget, at, warmup=warmup, at_start=at_start, at_end=at_end, on_evaluation=on_evaluation
        )
        self.settings = ProbeSettings(
            rules=rules,
            key_expert_frequency=key_expert_frequency,
            max_length=max_length,
            batch_tokens=batch_tokens,
            dense=dense,
            activation=activation,
            alignment=alignment,
        )
        self.asked = Asked(
            benchmarks=benchmarks,
            benchmarks_every=benchmarks_every,
            performance={} if performance is None else performance,
            phase_window=phase_window,
            phase_level=phase_level,
            detail=detail,
            alerts=alerts,
            ablate=ablate,
        )
        self.tokenizer = tokenizer
        self.sinks = tuple(sinks)
        self.eval_samples = eval_samples
        self.moe_model = moe_model
        self.on_error: OnError = on_error
        self.pictures: Pictures = pictures
        self.tables = tables
        self._monitor: RunMonitor | None = None
        self._last_state: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        """An event that is not known yet: of a trainer that was imported after this was made."""
        wanted = with_trainer_classes(plain_class(type(self)))
        if type(self) is wanted:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self.__class__ = wanted
        return getattr(self, name)

    def __reduce__(self) -> tuple[Any, ...]:
        own = plain_class(type(self))
        # What belongs to a training that is under way is not for a copy.
        return own.__new__, (own,), self.__dict__ | {"_monitor": None, "_loggers": ()}

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """The one event that both kinds of trainer name alike, with three arguments and with two."""
        handler = HFEvents.on_train_end if len(args) == 3 else LightningEvents.on_train_end
        handler(self, *args, **kwargs)

    def _begin(self, training: Training) -> None:
        self._end()  # of a training that was interrupted where no event tells
        self._monitor = RunMonitor(
            lambda: self._make_probe(training),
            schedule=self.schedule,
            on_error=self.on_error,
            output_dir=training.output_dir,
            sinks=[
                *training.trackers,
                *pictures_at(training.trackers, pictures=self.pictures, tables=self.tables),
                *self.sinks,
            ],
            asked=self.asked,
            tokenizer=self.tokenizer or training.tokenizer,
            start_step=training.step,
            state=training.state,
        )

    def _step(self, step: int, *, evaluated: bool = False, last: bool = False) -> None:
        if self._monitor is not None:
            self._monitor.step(step, evaluated=evaluated, last=last)

    def _end(self) -> None:
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            self._last_state = monitor.state_dict()
            monitor.close()

    def _state(self) -> dict[str, Any]:
        return self._last_state if self._monitor is None else self._monitor.state_dict()

    def _make_probe(self, training: Training) -> MUIProbe:
        settle_roots(training.model)
        model = self._find_model(training)
        tokenizer = self.tokenizer or training.tokenizer
        probe_set = self.probe_set
        if probe_set is None:
            # Every process reads them, as it may change the data; but some give each process other rows.
            processes = Processes()
            has_tokenizer = tokenizer is not None
            own = processes.together(lambda: self._read_eval_data(training, can_do_without=has_tokenizer))
            probe_set = processes.from_main(lambda: own)
        if probe_set is None:
            probe_set = builtin_for(model, tokenizer, _HINT)
        return MUIProbe(model, probe_set, tokenizer=tokenizer, **asdict(self.settings))

    def _find_model(self, training: Training) -> nn.Module:
        if isinstance(self.moe_model, nn.Module):
            return self.moe_model
        if self.moe_model is not None:
            return named_model(training.model, self.moe_model)
        return find_language_model(training.model, dense=self.settings.dense)

    def _read_eval_data(self, training: Training, *, can_do_without: bool) -> ProbeSet | None:
        try:
            return training.eval_data(self.eval_samples)
        except Exception as error:  # a data set or a collator of the user's own may raise anything
            if not can_do_without:
                raise
            warn(f"The eval data cannot be probed ({described(error)}); using the built-in probe set.")
            return None

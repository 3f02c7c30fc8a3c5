"""`MUIMonitor`: the same as the callback, for whoever writes the training loop."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from operator import index
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from mui_callback.benchmarks.given import Benchmarks
from mui_callback.forgiving import warn
from mui_callback.metrics.catalogue import Detail
from mui_callback.monitoring.alert_rule import AlertRule
from mui_callback.monitoring.asked import Ablate, Asked
from mui_callback.monitoring.benchmark_runs import BenchmarksEvery
from mui_callback.monitoring.run_monitor import OnError, RunMonitor, check_sinks
from mui_callback.monitoring.schedule import Every, Schedule
from mui_callback.pictures.scene import Pictures, check_pictures
from mui_callback.pictures.sink import pictures_at
from mui_callback.probe.default import builtin_for, check_probe_set
from mui_callback.probe.encode import Tokenizer
from mui_callback.probe.probe_set import ProbeSet
from mui_callback.probe.run import MUIProbe
from mui_callback.rules import Rules
from mui_callback.settings import Activation, Alignment, ProbeSettings
from mui_callback.sinks.base import Sink
from mui_callback.sinks.given import as_sinks

_HINT = "pass a probe set, or a tokenizer for the built-in one."


class MUIMonitor:
    """Measures expert utilization while a loop trains an MoE language model: bare torch, accelerate, DeepSpeed.

        with MUIMonitor(model, probe_set, tokenizer=tokenizer) as monitor:
            for step, batch in enumerate(loader, start=1):
                ...
                optimizer.step()
                monitor.step(step)

    It probes the untrained model at once, then at the steps of its schedule, and at the end. Points go to ``mui.jsonl``
    in `output_dir` and to the active W&B run. In a distributed run every process makes a monitor and calls it alike;
    the main one writes. What is measured is what the model computes where `step` is called: call it inside of your
    ``torch.autocast`` if the training loss is computed in one.

    Args:
        model: as for `MUIProbe`; what accelerate, DDP or a DeepSpeed engine wrapped around it is taken off.
        probe_set: the samples; without it, the built-in set.
        tokenizer: for samples that are text.
        start_step: optimizer steps done so far, where training goes on and there is no `state`, which knows them.
        state: what `state_dict` gave, from your checkpoint.
        output_dir: where ``mui.jsonl`` goes; where training goes on, it is read there too.
        tracker: where scalars go: ``"wandb"``, ``"trackio"`` or ``"mlflow"`` for the active run; a ``SummaryWriter`` of
            TensorBoard; a logger of Lightning or Fabric, such as ``CSVLogger("run")``; any other sink, such as
            ``WandbSink("my/step")`` for an x axis of your own; a list of these; None for none.
        sinks: where points go besides.
        every: see `Schedule`, as the six that follow.
        budget: share of the training time.
        at: steps to probe besides.
        warmup: also after 1, 2, 4, 8, … steps.
        at_start: also before the first step.
        at_end: also when the monitor is closed.
        on_evaluation: also at steps with ``evaluated=True``.
        on_error: ``"warn"`` or ``"raise"``.
        rules: which contributions make key neurons, see `ProbeSettings`, as the parameters that follow.
        key_expert_frequency: η_expert.
        batch_tokens: positions in a forward pass.
        max_length: tokens that longer samples are cut to.
        dense: also probe the MLP of each layer without experts.
        activation: ``"gate"`` leaves out the up factor.
        alignment: ``"same"`` scores a position against the token at it.
        benchmarks: run on the live model and logged next to the probe; see `MUICallback`, as the following.
        benchmarks_every: optimizer steps, or ``"probe"``.
        performance: the score of a benchmark that is the performance of a task in phases, by task.
        phase_window: points that a phase is called from.
        phase_level: of the intervals of both trends.
        detail: ``"layers"``: also log MUI, shared share, concentration and dead experts of each layer, in at most
            256 keys.
        alerts: False for no alerts; an `AlertRule` for other thresholds; see `mui_callback.monitoring.alert_rule`.
        ablate: ``"neurons"`` (or True) or ``"experts"``, when the monitor is closed.
        pictures: see `MUICallback`, as the following.
        tables: of the experts, when the monitor is closed.

    Raises:
        MUIError: see `MUICallback`.
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        probe_set: ProbeSet | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        start_step: int | None = None,
        state: Mapping[str, Any] | None = None,
        output_dir: str | os.PathLike[str] = ".",
        tracker: Any = "wandb",
        sinks: Sequence[Sink] = (),
        every: Every = Schedule.every,
        budget: float = Schedule.budget,
        at: Iterable[int] = Schedule.at,
        warmup: bool = Schedule.warmup,
        at_start: bool = Schedule.at_start,
        at_end: bool = Schedule.at_end,
        on_evaluation: bool = Schedule.on_evaluation,
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
        schedule = Schedule(
            every, budget, at, warmup=warmup, at_start=at_start, at_end=at_end, on_evaluation=on_evaluation
        )
        settings = ProbeSettings(
            rules=rules,
            key_expert_frequency=key_expert_frequency,
            max_length=max_length,
            batch_tokens=batch_tokens,
            dense=dense,
            activation=activation,
            alignment=alignment,
        )
        asked = Asked(
            benchmarks=benchmarks,
            benchmarks_every=benchmarks_every,
            performance={} if performance is None else performance,
            phase_window=phase_window,
            phase_level=phase_level,
            detail=detail,
            alerts=alerts,
            ablate=ablate,
        )
        trackers = as_sinks(tracker)
        check_sinks(sinks)
        check_probe_set(probe_set)
        check_pictures(pictures, tables)

        def make_probe() -> MUIProbe:
            samples = builtin_for(model, tokenizer, _HINT) if probe_set is None else probe_set
            return MUIProbe(model, samples, tokenizer=tokenizer, **asdict(settings))

        self._step = self._start_step = _start_step(start_step, state)
        self._run = RunMonitor(
            make_probe,
            schedule=schedule,
            on_error=on_error,
            output_dir=Path(output_dir),
            sinks=[
                *trackers,
                *pictures_at(trackers, pictures=pictures, tables=tables, is_crowded=True),
                *sinks,
            ],
            asked=asked,
            tokenizer=tokenizer,
            start_step=self._start_step,
            state=state,
        )

    def step(self, step: int, *, evaluated: bool = False) -> None:
        """Probe if it is due; to be called after each optimizer step.

        Args:
            step: optimizer steps done, 1 after the first.
            evaluated: whether you have just evaluated, for ``on_evaluation=True``.
        """
        step = index(step)
        if step == 0 == self._start_step:
            warn("MUIMonitor: step 0 is the untrained model, which was probed before; the first optimizer step is 1.")
        if self._step == self._start_step == 0 and step > 1:
            warn(
                f"MUIMonitor began at step 0, and the first step that it is told of is {step}. If training was "
                f"resumed, the point at step 0 is not of the untrained model: pass start_step={step - 1} or state=."
            )
        self._step = step
        self._run.step(step, evaluated=evaluated)

    def state_dict(self) -> dict[str, Any]:
        """For your checkpoint: numbers, strings, lists and dicts."""
        return self._run.state_dict()

    def close(self) -> None:
        """Probe the last step, if ``at_end=True``, and let go of the sinks; a second call does nothing."""
        try:
            if self._step > self._start_step:
                self._run.step(self._step, last=True)
        finally:
            self._run.close()

    def __enter__(self) -> MUIMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close; after an exception without another probe."""
        if error is None:
            self.close()
        else:
            self._run.close()


def _start_step(start_step: int | None, state: Mapping[str, Any] | None) -> int:
    if state is None:
        return index(start_step or 0)
    known = state.get("step") if isinstance(state, Mapping) else None
    if not isinstance(known, int):
        raise ValueError(f"state: expected what MUIMonitor.state_dict() gave, got {state!r:.80}")
    if start_step not in (None, known):
        raise ValueError(f"start_step: expected the step of the state, {known}, or none, got {start_step}")
    return known

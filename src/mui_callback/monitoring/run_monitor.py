"""Probing a training run: measure when it is due, hand the point on, and never harm the training.

It knows no trainer: whoever trains says how many optimizer steps are done.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import nn

from mui_callback.errors import DesynchronizedError, ProbeError
from mui_callback.metrics.catalogue import OVERHEAD
from mui_callback.monitoring.history import History, begin
from mui_callback.monitoring.processes import Failure, Processes
from mui_callback.monitoring.schedule import Schedule
from mui_callback.monitoring.stopwatch import Stopwatch
from mui_callback.probe.encode import Tokenizer
from mui_callback.probe.freeze import random_state_kept
from mui_callback.probe.probe_set import ProbeSet
from mui_callback.probe.run import MUIProbe
from mui_callback.report import MUIReport
from mui_callback.settings import ProbeSettings
from mui_callback.sinks.base import ProbePoint, RunDescription, Sink
from mui_callback.sinks.jsonl import JsonlSink, read_record

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

OnError = Literal["warn", "raise"]
RECORD_NAME = "mui.jsonl"
"""Name of the record in the output directory."""
_GIVE_UP_AFTER = 3
"""Failures in a row after which probing stops."""


class RunMonitor:
    """Measures at the steps of a schedule and writes every point to the sinks.

    In a distributed run every process has one and calls it in the same way; a probe counts if it went well in all of
    them, and the main one writes.

    Args:
        model: see `MUIProbe`, as the tokenizer.
        probe_set: the samples.
        tokenizer: for samples that are text.
        settings: how a probe is made.
        schedule: when one is.
        on_error: what happens if one fails. ``"warn"``: a warning, and a point that says so; training goes on.
            ``"raise"``: the exception, in every process, after the point was written.
        output_dir: where the record is.
        sinks: where points go besides.
        start_step: optimizer steps done. At 0, the untrained model is probed at once.
        state: what `state_dict` gave, where a run goes on.

    Raises:
        MUIError: see `MUIProbe`; in every process, if it is so in one.
    """

    def __init__(
        self,
        model: nn.Module,
        probe_set: ProbeSet,
        *,
        tokenizer: Tokenizer | None,
        settings: ProbeSettings,
        schedule: Schedule,
        on_error: OnError,
        output_dir: Path,
        sinks: Sequence[Sink],
        start_step: int = 0,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        check_on_error(on_error)
        self.schedule = schedule
        self.on_error = on_error
        self._is_probing = True
        self._is_closed = False
        self._processes = Processes()
        self._probe = self._together(lambda: MUIProbe(model, probe_set, tokenizer=tokenizer, **asdict(settings)))
        run = RunDescription(probe_set.task_names, probe_set.fingerprint, self._probe.settings, self._probe.layout)
        self._probed = run.to_dict()
        record = output_dir / RECORD_NAME
        known = self._processes.from_main(lambda: self._begin(start_step, record, state))
        self._history = History.from_dict(known)
        self._stopwatch = Stopwatch(start_step, self._history.spent)
        self._next_look = start_step
        self._last_due: int | None = None
        self._failures_in_a_row = 0
        self._complained: set[int] = set()
        self._sinks: tuple[Sink, ...] = (JsonlSink(record), *sinks) if self._processes.is_main else ()
        run = replace(run, id=self._history.run_id, start_step=start_step)
        with random_state_kept():
            self._tell_sinks(lambda sink: sink.open(run))
        logger.info("MUI: probing %r in %r", probe_set, self._probe.layout)
        self._look_again(start_step)
        if start_step == 0:
            self._start()

    def step(self, step: int, *, evaluated: bool = False, last: bool = False) -> None:
        """Probe if it is due; to be called after each optimizer step.

        Args:
            step: optimizer steps done.
            evaluated: whether the trainer has just evaluated.
            last: whether training ends here.
        """
        self._stopwatch.step = step
        if not self._is_probing or step == self._last_due:
            return
        try:
            if not self._is_due(step, evaluated=evaluated, last=last):
                return
            self._last_due = step
            if step in self._history.points:
                logger.info("MUI: the point at step %d was logged before training was resumed", step)
                return
            with random_state_kept():
                self._make_point(step)
            self._look_again(step)
        except DesynchronizedError as error:
            if self.on_error == "raise":
                raise
            self._stop(f"MUI: no more probes after step {step}: {error}")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold so that the run can go on: numbers, strings, lists and dicts."""
        history = replace(self._history, spent=self._stopwatch.spent)
        return {"step": self._stopwatch.step, "probed": self._probed, "history": history.to_dict()}

    def close(self) -> None:
        """To be called after training; a second call does nothing."""
        if self._is_closed:
            return
        self._is_closed, self._is_probing = True, False
        with random_state_kept():
            self._tell_sinks(lambda sink: sink.close())

    def _start(self) -> None:
        try:
            self.step(0)
        except Exception:
            self.close()
            raise

    def _begin(self, start_step: int, record: Path, state: Mapping[str, Any] | None) -> dict[str, Any]:
        recorded = read_record(record) if start_step or state else []
        return begin(self._probed, start_step, recorded, state).to_dict()

    # When

    def _is_due(self, step: int, *, evaluated: bool, last: bool) -> bool:
        if self.schedule.is_due(step, evaluated=evaluated, last=last):
            return True
        if not self.schedule.is_auto or step < self._next_look:
            return False
        affordable = self._processes.from_main(lambda: self.schedule.affords(self._stopwatch.spent))
        if not affordable:
            self._look_again(step)
        return affordable

    def _look_again(self, step: int) -> None:
        """Only the main process looks at its watch, so that all processes find the same."""
        if self.schedule.is_auto:
            self._next_look = self._processes.from_main(lambda: self.schedule.next_look(step, self._stopwatch.spent))

    # What

    def _make_point(self, step: int) -> None:
        self._probe.wait_for_device()
        with self._stopwatch.probing():
            try:
                report = self._measure()
            except DesynchronizedError:
                raise
            except Exception as error:
                self._failed(step, error)
            else:
                self._succeeded(step, report)

    def _measure(self) -> MUIReport:
        """One report; with smaller batches if memory runs out in any process."""
        while True:
            report, error = _attempt(self._measure_once)
            failures = self._processes.failures(error)
            if not failures:
                assert report is not None
                return report
            if not all(failure.out_of_memory for failure in failures) or not self._probe.halve_batches():
                raise error or ProbeError(_words(failures))
            error = None  # its traceback holds the tensors of the pass
            torch.cuda.empty_cache()
            _warn(
                f"MUI: out of memory in a probe; going on with batches of {self._probe.settings.batch_tokens} tokens "
                f"({_words(failures)})"
            )

    def _measure_once(self) -> MUIReport:
        report = self._probe.measure()
        if report.broken_samples:
            raise ProbeError(
                f"the loss of {report.broken_samples} of {report.samples} samples is NaN or infinite: the model puts "
                "out no usable logits"
            )
        return report

    def _succeeded(self, step: int, report: MUIReport) -> None:
        self._failures_in_a_row = 0
        spent = self._stopwatch.spent
        overhead = {} if spent.overhead is None else {OVERHEAD: spent.overhead}
        point = ProbePoint(step, report=report, scalars=report.scalars() | overhead, spent=spent)
        self._history.points[step] = point.scalars
        if report.not_finite:
            _warn(
                f"MUI probe at step {step}: {report.not_finite} contributions are NaN or infinite; they do not count."
            )
        self._tell_sinks(lambda sink: sink.write(point))

    def _failed(self, step: int, error: Exception) -> None:
        self._failures_in_a_row += 1
        reason = f"{type(error).__name__}: {error}"
        point = ProbePoint(step, error=reason, spent=self._stopwatch.spent)
        self._tell_sinks(lambda sink: sink.write(point))
        if self.on_error == "raise":
            raise error
        logger.debug("MUI probe at step %d failed", step, exc_info=error)
        if self._failures_in_a_row < _GIVE_UP_AFTER:
            _warn(f"MUI probe at step {step} failed; training goes on. {reason}")
        else:
            self._stop(
                f"MUI probe at step {step} failed, the {_GIVE_UP_AFTER}rd in a row; no more probes are made, training "
                f"goes on. {reason}"
            )

    def _stop(self, message: str) -> None:
        self._is_probing = False
        _warn(message)

    def _tell_sinks(self, action: Callable[[Sink], None]) -> None:
        """Each of them, whatever the others do; one warning for each that fails."""
        first: Exception | None = None
        for sink in self._sinks:
            _, error = _attempt(partial(action, sink))
            first = first or error
            if error is not None and self.on_error == "warn" and id(sink) not in self._complained:
                self._complained.add(id(sink))
                _warn(f"{getattr(sink, 'name', type(sink).__name__)} failed: {type(error).__name__}: {error}")
        if self.on_error == "raise":
            self._raise_everywhere(first)

    def _together(self, action: Callable[[], _T]) -> _T:
        """Do something that raises in every process if it does in one."""
        result, error = _attempt(action)
        self._raise_everywhere(error)
        assert result is not None
        return result

    def _raise_everywhere(self, error: Exception | None) -> None:
        if failures := self._processes.failures(error):
            raise error or ProbeError(_words(failures))


def check_on_error(on_error: str) -> None:
    """Raises ValueError for what is not an `OnError`."""
    if on_error not in get_args(OnError):
        raise ValueError(f"on_error: expected 'warn' or 'raise', got {on_error!r}")


def _attempt(action: Callable[[], _T]) -> tuple[_T | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error


def _words(failures: Sequence[Failure]) -> str:
    return "; ".join(map(str, failures))


def _warn(message: str) -> None:
    """A warning that stays one where warnings are turned into errors."""
    try:
        warnings.warn(message, stacklevel=3)
    except Warning:
        logger.warning(message)

"""Probing a training run: measure when it is due, hand the point on, and never harm the training.

It knows no trainer: whoever trains says how many optimizer steps are done.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from operator import index
from pathlib import Path
from traceback import format_exception
from typing import Any, Literal, get_args

from mui_callback.errors import DesynchronizedError, InterruptedPassError
from mui_callback.forgiving import described, warn
from mui_callback.metrics.catalogue import OVERHEAD
from mui_callback.monitoring.alerts import Alerts
from mui_callback.monitoring.asked import Asked
from mui_callback.monitoring.besides import Besides, Found
from mui_callback.monitoring.delivery import Delivery
from mui_callback.monitoring.history import History
from mui_callback.monitoring.pace import Pace
from mui_callback.monitoring.recall import recalled
from mui_callback.monitoring.schedule import Schedule
from mui_callback.monitoring.stopwatch import Stopwatch
from mui_callback.parallel.processes import Processes
from mui_callback.probe.freeze import random_state_kept
from mui_callback.probe.run import MUIProbe
from mui_callback.probe.usable import check_scored, measure_usable
from mui_callback.report import MUIReport
from mui_callback.sinks.base import ProbePoint, RunDescription, Sink
from mui_callback.sinks.jsonl import JsonlSink

logger = logging.getLogger(__name__)

OnError = Literal["warn", "raise"]
RECORD_NAME = "mui.jsonl"
"""Name of the record in the output directory."""
_GIVE_UP_AFTER = 3
"""Failures in a row after which probing stops."""


class RunMonitor:
    """Measures at the steps of a schedule and writes every point to the sinks.

    In a distributed run every process has one and calls it in the same way; a probe counts if it went well in all of
    them, and the main one writes. The processes talk to each other in `__init__` and in `step` only.

    Args:
        make_probe: finds what is to be measured.
        schedule: when it is.
        on_error: what happens if a probe fails. ``"warn"``: a warning, and a point that says so; training goes on.
            ``"raise"``: the exception, in every process, after the point was written.
        output_dir: where the record is.
        sinks: where points go besides.
        asked: what is to be found besides the probe.
        tokenizer: for the benchmarks among it.
        start_step: optimizer steps done. At 0, the untrained model is probed at once.
        state: what `state_dict` gave, where a run goes on.

    Raises:
        ProbeSetError: a task of the probe set has nothing to score.
        Exception: whatever `make_probe` raises, or the benchmarks where they are loaded. In every other process, a
            `ProbeError`.
    """

    def __init__(
        self,
        make_probe: Callable[[], MUIProbe],
        *,
        schedule: Schedule,
        on_error: OnError,
        output_dir: Path,
        sinks: Sequence[Sink],
        asked: Asked = Asked(),  # noqa: B008 - it is frozen
        tokenizer: Any = None,
        start_step: int = 0,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        check_on_error(on_error)
        self.on_error = on_error
        self._is_probing, self._is_closed = True, False
        self._step = start_step
        self._has_gone_back = False
        self._failures_in_a_row = 0
        self._detail = asked.detail
        self._processes = Processes()
        self._alerts = Alerts(
            asked.alerts, schedule.budget if schedule.is_auto else None, is_main=self._processes.is_main
        )
        self._probe = self._processes.together(lambda: check_scored(make_probe()))
        self._probe.agree(self._processes)
        benchmarks = self._processes.together(lambda: asked.load(self._probe.settings, tokenizer))
        run = RunDescription(
            self._probe.probe_set.task_names,
            self._probe.probe_set.fingerprint,
            self._probe.settings,
            self._probe.layout,
        )
        self._probed = run.to_dict()
        record = output_dir.absolute() / RECORD_NAME  # training may go to another directory
        before = partial(recalled, self._probed, start_step, record, state, asked.phase_window)
        known = self._processes.from_main(lambda: before(must_be_known=on_error == "raise").to_dict())
        self._history = History.from_dict(known)
        self._logged_before = frozenset(self._history.points)
        stopwatch = Stopwatch(start_step, self._history.spent)
        self._besides = Besides(
            asked,
            benchmarks,
            self._probe,
            schedule=schedule,
            stopwatch=stopwatch,
            processes=self._processes,
            trajectories=self._history.trajectories,
        )
        self._latest: tuple[int, MUIReport] | None = None
        self._pace = Pace(schedule, stopwatch, self._processes)
        self._delivery = Delivery((JsonlSink(record), *sinks) if self._processes.is_main else ())
        run = replace(run, id=self._history.run_id, start_step=start_step, points_before=dict(self._history.points))
        logger.info("MUI: probing %r in %r", self._probe.probe_set, self._probe.layout)
        try:
            with random_state_kept():
                self._tell_sinks(lambda sink: sink.open(run))
            if start_step == 0:
                self.step(0)
        except BaseException:
            with suppress(Exception):
                self.close()
            raise

    def step(self, step: int, *, evaluated: bool = False, last: bool = False) -> None:
        """Probe if it is due; to be called after each optimizer step.

        Args:
            step: optimizer steps done.
            evaluated: whether the trainer has just evaluated.
            last: whether training ends here.

        Raises:
            TypeError: the step is no whole number.
            InterruptedPassError: the model failed in a forward pass in which processes wait for each other, so that
                training cannot go on either.
            Exception: with ``on_error="raise"``, whatever went wrong.
        """
        step = index(step)
        if step < self._step:
            self._gone_back(step)
            return
        self._step = step
        if not self._is_probing:
            return
        try:
            needed = self._besides.need_a_probe(step, last=last)
            if not self._pace.is_due(step, evaluated=evaluated, last=last, needed=needed):
                if last:
                    self._complete(step)
                with self._pace.stopwatch.apart():
                    self._delivery.between_points()
                return
            self._latest = None
            if step in self._logged_before:
                logger.info("MUI: the point at step %d was logged before training was resumed", step)
                self._pace.skip(step)
                return
            self._probe.wait_for_device()
            with random_state_kept(), self._pace.probing(step, last=last):
                self._make_point(step, last=last)
        except DesynchronizedError as error:
            self._write(self._failed_point(step, error, is_last=True))
            if self.on_error == "raise":
                raise
            self._stop(f"MUI: no more probes after step {step}, training goes on. {error}")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold so that the run can go on: numbers, strings, lists and dicts."""
        history = replace(self._history, spent=self._pace.spent)
        return {"step": self._step, "probed": self._probed, "history": history.to_dict()}

    def close(self) -> None:
        """To be called after training, whatever ended it; a second call does nothing.

        Raises:
            Exception: with ``on_error="raise"``, whatever a sink raised; in this process only.
        """
        if self._is_closed:
            return
        self._is_closed, self._is_probing = True, False
        with random_state_kept(), self._pace.stopwatch.apart():
            error = self._delivery.tell(lambda sink: sink.close())
        if error is not None and self.on_error == "raise":
            raise error

    def _gone_back(self, step: int) -> None:
        message = (
            f"MUI: expected the number of optimizer steps done so far, at least {self._step}, got {step}. Steps count "
            "on from epoch to epoch."
        )
        if self.on_error == "raise":
            raise ValueError(message)
        if not self._has_gone_back:
            self._has_gone_back = True
            warn(f"{message} Until then there is no probe.")

    # One point

    def _make_point(self, step: int, *, last: bool) -> None:
        try:
            report = measure_usable(self._probe)
            scalars = report.scalars(detail=self._detail)
        except DesynchronizedError:
            raise
        except InterruptedPassError as error:
            self._write(self._failed_point(step, error))
            raise
        except Exception as error:
            self._fail(step, error)
        else:
            self._latest = (step, report) if self._besides.may_come_later else None
            self._succeed(step, report, scalars, self._find(step, report, last=last))

    def _complete(self, step: int) -> None:
        """What belongs to the last step, where nobody knew that it is the last when it was probed."""
        probed, report = self._latest or (None, None)
        if report is None or probed != step:
            return
        self._probe.wait_for_device()
        with random_state_kept(), self._pace.stopwatch.apart():
            found = self._find(step, report, last=True)
            if found:
                self._history.points[step] = self._history.points[step] | found.scalars
                self._hand_on(ProbePoint(step, scalars=found.scalars, spent=self._pace.spent), found)

    def _find(self, step: int, report: MUIReport, *, last: bool) -> Found:
        try:
            return self._besides.find(step, report, last=last)
        except InterruptedPassError as error:
            self._write(self._failed_point(step, error))
            raise

    def _succeed(self, step: int, report: MUIReport, scalars: dict[str, float], found: Found) -> None:
        self._failures_in_a_row = 0
        scalars |= found.scalars
        spent = self._pace.spent
        if spent.overhead is not None:
            scalars[OVERHEAD] = spent.overhead
        self._history.points[step] = scalars
        if report.not_finite:
            warn(f"MUI probe at step {step}: {report.not_finite} contributions are NaN or infinite and do not count.")
        alerts = self._alerts.at(step, self._history.points)
        self._hand_on(ProbePoint(step, report=report, scalars=scalars, spent=spent, alerts=alerts), found)

    def _hand_on(self, point: ProbePoint, found: Found) -> None:
        whole = replace(
            point,
            phases=found.phases,
            benchmarks=found.benchmarks,
            ablation=found.ablation,
            failures=found.failures,
        )
        self._tell_sinks(lambda sink: sink.write(whole))
        if found.error is not None and self.on_error == "raise":
            raise found.error

    def _fail(self, step: int, error: Exception) -> None:
        self._failures_in_a_row += 1
        point = self._failed_point(step, error, is_last=self._failures_in_a_row == _GIVE_UP_AFTER)
        self._write(point)
        if self.on_error == "raise":
            raise error
        logger.debug("MUI probe at step %d failed", step, exc_info=error)
        if self._failures_in_a_row < _GIVE_UP_AFTER:
            warn(f"MUI probe at step {step} failed; training goes on. {point.error}")
        else:
            self._stop(
                f"MUI probe at step {step} failed, {_GIVE_UP_AFTER} in a row; no more are made, training goes on. "
                f"{point.error}"
            )

    def _failed_point(self, step: int, error: Exception, *, is_last: bool = False) -> ProbePoint:
        """A point that says what went wrong; if it is the last one, trackers are alerted."""
        where, what = "".join(format_exception(error)), described(error)
        alerts = self._alerts.of_failure(step, what) if is_last else ()
        return ProbePoint(step, error=what, traceback=where, spent=self._pace.spent, alerts=alerts)

    def _stop(self, message: str) -> None:
        self._is_probing = False
        warn(message)

    # Sinks

    def _write(self, point: ProbePoint) -> None:
        """A point that is followed by an exception of its own, if there is to be one."""
        self._delivery.tell(lambda sink: sink.write(point))

    def _tell_sinks(self, action: Callable[[Sink], None]) -> None:
        error = self._delivery.tell(action)
        if self.on_error == "raise":
            self._processes.raise_everywhere(error)


def check_on_error(on_error: str) -> None:
    """Raises ValueError for what is not an `OnError`."""
    if on_error not in get_args(OnError):
        raise ValueError(f"on_error: expected 'warn' or 'raise', got {on_error!r}")


def check_sinks(sinks: object) -> None:
    """Raises TypeError for what is no sequence of sinks."""
    if not isinstance(sinks, Sequence) or any(isinstance(s, type) or not hasattr(s, "write") for s in sinks):
        raise TypeError(f"sinks: expected a list of sinks, such as [MemorySink()], got {sinks!r:.80}")

"""What is found besides a probe at the same step: benchmarks, phases and, at the end of training, the causal check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from mui_callback.benchmarks.base import Benchmark
from mui_callback.benchmarks.names import benchmark_scalars
from mui_callback.errors import DesynchronizedError, InterruptedPassError
from mui_callback.forgiving import attempt, described, warn
from mui_callback.metrics.phases import Point
from mui_callback.metrics.trajectory import TaskPhase, Trajectories
from mui_callback.monitoring.asked import Asked
from mui_callback.monitoring.benchmark_runs import BenchmarkResults, BenchmarkRuns
from mui_callback.monitoring.final_ablation import ablation_scalars
from mui_callback.monitoring.phases import Phases, phase_scalars
from mui_callback.monitoring.schedule import Schedule
from mui_callback.monitoring.stopwatch import Stopwatch
from mui_callback.parallel.processes import Processes
from mui_callback.probe.ablation import AblationReport, What, ablate
from mui_callback.probe.run import MUIProbe
from mui_callback.report import MUIReport


@dataclass
class Found:
    """What was found besides a probe at one step."""

    scalars: dict[str, float] = field(default_factory=dict)
    """What is logged of it, by key."""
    phases: Mapping[str | None, TaskPhase] = field(default_factory=dict)
    benchmarks: Mapping[str, Point] = field(default_factory=dict)
    ablation: AblationReport | None = None
    failures: dict[str, str] = field(default_factory=dict)
    """What went wrong, by what it was."""
    error: Exception | None = None
    """The first of it; in every process there is one, or in none."""

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self.scalars or self.failures)

    def failed(self, what: str, error: Exception) -> None:
        """Note what went wrong."""
        self.failures[what] = described(error)
        self.error = self.error or error


class Besides:
    """Finds it. In a distributed run every process has one and calls it in the same way.

    Args:
        asked: what is asked for.
        benchmarks: those among it, loaded.
        probe: the model and the samples.
        schedule: of the probe.
        stopwatch: that of the run.
        processes: those of the run.
        trajectories: the points before, which those that are found are added to.

    Raises:
        ValueError: the performance of a task is named that is none of the probe set.
    """

    def __init__(
        self,
        asked: Asked,
        benchmarks: Sequence[Benchmark],
        probe: MUIProbe,
        *,
        schedule: Schedule,
        stopwatch: Stopwatch,
        processes: Processes,
        trajectories: Trajectories,
    ) -> None:
        tasks = probe.probe_set.task_names
        if unknown := [task for task in asked.performance if task is not None and task not in tasks]:
            raise ValueError(
                f"performance: expected tasks of the probe set, {', '.join(tasks)}, got {', '.join(unknown)}"
            )
        self._probe = probe
        self._stopwatch = stopwatch
        self._benchmarks = BenchmarkRuns(benchmarks, asked.benchmarks_every, schedule, stopwatch.step, processes)
        self._phases = Phases(asked.rule, asked.performance, trajectories, is_main=processes.is_main)
        self._what: What | None = asked.what

    def need_a_probe(self, step: int, *, last: bool) -> bool:
        """Whether something is due at this step that a probe belongs to; to be asked once a step, or again."""
        are_due = self._benchmarks.are_due(step, last=last)
        return are_due or (last and self._what is not None)

    @property
    def may_come_later(self) -> bool:
        """Whether something can become due at a step that was probed, when it turns out to be the last."""
        return self._what is not None or self._benchmarks.have_own_interval

    def find(self, step: int, report: MUIReport, *, last: bool) -> Found:
        """What is due at this step and was not found before.

        Args:
            step: optimizer steps done.
            report: of the probe at this step.
            last: whether training ends here.

        Raises:
            InterruptedPassError: a model failed where processes wait for each other in a forward pass.
            DesynchronizedError: not all processes made this call.
        """
        found = Found()
        results = self._run_benchmarks(step)
        for failure in results.failures:
            found.failed(f"benchmark {failure.name}", failure.error)
        found.benchmarks = results.scores
        self._call_phases(found, step, report, were_run=results.were_run)
        if last and self._what is not None:
            what, self._what = self._what, None
            with self._stopwatch.apart():
                self._ablate(found, step, report, what)
        found.scalars = {
            **benchmark_scalars(found.benchmarks),
            **phase_scalars(found.phases),
            **(ablation_scalars(found.ablation) if found.ablation else {}),
        }
        return found

    def _run_benchmarks(self, step: int) -> BenchmarkResults:
        if not self._benchmarks.have_own_interval:
            return self._benchmarks.run(self._probe, step)
        with self._stopwatch.apart():
            return self._benchmarks.run(self._probe, step)

    def _call_phases(self, found: Found, step: int, report: MUIReport, *, were_run: bool) -> None:
        call = partial(self._phases.at, step, report, found.benchmarks)
        phases, error = attempt(partial(call, were_run=were_run, more_to_come=self._benchmarks.go_on))
        if error is not None:
            warn(f"MUI at step {step}: there are no phases; training goes on. {described(error)}")
            found.failed("phases", error)
        found.phases = phases or {}

    def _ablate(self, found: Found, step: int, report: MUIReport, what: What) -> None:
        found.ablation, error = attempt(lambda: ablate(self._probe, report, what=what))
        if isinstance(error, InterruptedPassError | DesynchronizedError):
            raise error
        if error is not None:
            warn(f"MUI at step {step}: the ablation of key {what} failed; training goes on. {described(error)}")
            found.failed("ablation", error)

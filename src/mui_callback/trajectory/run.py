"""`mui-callback trajectory`: every checkpoint of a study that is not measured yet, and the table of all of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal

from huggingface_hub.utils import disable_progress_bars
from rich.console import Console
from transformers.utils import logging as transformers_logging

from mui_callback.errors import DesynchronizedError, InterruptedPassError
from mui_callback.parallel.processes import Processes
from mui_callback.responses.cache import AnswerCache
from mui_callback.trajectory.claims import Claims
from mui_callback.trajectory.config import StudyConfig
from mui_callback.trajectory.crew import Crew
from mui_callback.trajectory.failures import Failures, in_words
from mui_callback.trajectory.fetching import Fetching
from mui_callback.trajectory.listing import StudiedCheckpoint
from mui_callback.trajectory.measuring import Measured, Measuring
from mui_callback.trajectory.planning import StudyPlan
from mui_callback.trajectory.progress import StudyProgress
from mui_callback.trajectory.records import RESULTS_NAME, SCORES_NAME, CheckpointRecord, open_study, write_record
from mui_callback.trajectory.rows import rows_of, scores_of, write_rows
from mui_callback.trajectory.screen import StudyOutcome, show_outcome
from mui_callback.whole_file import remove_partial

_ANSWERS_NAME = "generations"
_PAUSE = 2.0
"""Seconds between two looks at what other processes have measured."""
_State = Literal["done", "failed", "elsewhere", "to do"]


def run_study(config: StudyConfig, console: Console) -> StudyOutcome:
    """Measure what is not measured yet. Killed at any moment, it is gone on with by another call.

    Args:
        config: of the study.
        console: where to say how far it is.

    Raises:
        MUIError: see `StudyPlan.of`.
        InterruptedPassError: a process failed where others wait for it, so that nothing can go on.
        DesynchronizedError: processes that measure together do not come to the same point.
        OSError: what was measured cannot be written.
    """
    disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    crew = Crew.from_environment(config.distribute)
    device = crew.device(config.device)
    with crew.assembled(device):
        run = _Run(StudyPlan.of(config), crew, device, console)
        run.measure_all()
        outcome = run.outcome()
    if crew.is_main:
        show_outcome(console, config, outcome)
    return outcome


class _Run:
    """One run of a study in this process; where processes measure together, the main one decides and writes."""

    def __init__(self, plan: StudyPlan, crew: Crew, device: str, console: Console) -> None:
        self._plan = plan
        self._crew = crew
        self._decides = crew.is_main or not crew.works_together
        self._directory = plan.config.output
        self._processes = Processes()
        self._progress = StudyProgress(console, is_quiet=not self._decides, has_bars=crew.is_main)
        self._claims = Claims(self._directory)
        self._failures = Failures(self._directory)
        cache = AnswerCache(self._directory / _ANSWERS_NAME)
        self._measuring = Measuring(plan.config, plan.tasks, crew, device, self._processes, cache, self._progress)

    def measure_all(self) -> None:
        """Until each is measured or has failed, here or in another process."""
        if self._decides:
            with self._claims.alone():
                remove_partial(self._directory)
                self._plan.write()
        left = self._crew.in_turn(self._plan.checkpoints)
        undone = [one for one in self._plan.checkpoints if self._plan.record(one) is None]
        n_done = len(left) - len(undone)
        if self._crew.is_main:
            for one in filter(self._plan.has_other_weights, undone):
                self._progress.say(f"{one.id}: other files than those that were measured; measured anew")
            self._progress.say(f"{self._plan.config.title}: {n_done} of {len(left)} checkpoints are measured")
        with self._progress.over(len(left), n_done), Fetching(self._plan.config.keep_checkpoints) as fetching:
            while left := self._once_through(left, fetching):
                self._progress.begin(f"another process has {left[0].id}")
                time.sleep(_PAUSE)
        if self._decides:
            self._write_table()

    def outcome(self) -> StudyOutcome:
        """What became of it, in all processes of this run; waits for them."""
        failures = self._crew.gather(self._failures.read())
        found = {one.checkpoint for one in open_study(self._directory).records}  # of another plan, if it was replaced
        measured = found.intersection(one.id for one in self._plan.checkpoints)
        return StudyOutcome(
            n_planned=len(self._plan.checkpoints),
            n_measured=len(measured),
            failures={one: why for part in failures for one, why in part.items() if one not in measured},
        )

    def _once_through(self, left: Sequence[StudiedCheckpoint], fetching: Fetching) -> list[StudiedCheckpoint]:
        """Measure those that nobody else does; returns those that somebody else has."""
        elsewhere: list[StudiedCheckpoint] = []
        for number, checkpoint in enumerate(left):
            with self._claims.claim(checkpoint.id) if self._decides else nullcontext(True) as is_mine:
                state = self._agreed_state(checkpoint, is_mine=is_mine)
                if state == "done":  # perhaps by a process that was killed before it let go
                    fetching.let_go(checkpoint.place)
                elif state == "elsewhere":
                    elsewhere.append(checkpoint)
                elif state == "to do":
                    following = (one for one in left[number + 1 :] if self._plan.record(one) is None)
                    self._measure(checkpoint, next(following, None), fetching)
        return elsewhere

    def _agreed_state(self, checkpoint: StudiedCheckpoint, *, is_mine: bool) -> _State:
        def state() -> _State:
            if self._plan.record(checkpoint) is not None:
                return "done"
            if checkpoint.id in self._failures.read():
                return "failed"
            return "to do" if is_mine else "elsewhere"

        return self._processes.from_main(state)

    def _measure(self, checkpoint: StudiedCheckpoint, following: StudiedCheckpoint | None, fetching: Fetching) -> None:
        self._progress.begin(f"fetching {checkpoint.id}")
        start = time.perf_counter()
        if self._decides:
            remove_partial(self._directory / _ANSWERS_NAME, checkpoint.id.slug)
        try:
            self._fetch(checkpoint, following, fetching)
            measured = self._measuring.measure(checkpoint)
        except (DesynchronizedError, InterruptedPassError):
            raise
        except Exception as error:
            if self._decides:
                self._failures.add(checkpoint.id, error)
            self._progress.checkpoint(f"{checkpoint.id}: {in_words(error)}", style="red")
        else:
            if self._decides:
                self._keep(checkpoint, measured, time.perf_counter() - start)
        finally:
            fetching.let_go(checkpoint.place)

    def _fetch(self, checkpoint: StudiedCheckpoint, following: StudiedCheckpoint | None, fetching: Fetching) -> None:
        """One process of each machine goes first; the others then find it there."""
        ahead = None if following is None else following.place
        is_first = self._crew.local_rank == 0 or not self._crew.works_together
        self._processes.together(lambda: fetching.fetch(checkpoint.place, ahead) if is_first else None)
        self._processes.together(lambda: None if is_first else fetching.fetch(checkpoint.place, None))

    def _keep(self, checkpoint: StudiedCheckpoint, measured: Measured, seconds: float) -> None:
        rows = rows_of(checkpoint.id, measured.report, measured.points, response=self._plan.config.response)
        record = CheckpointRecord(
            checkpoint=checkpoint.id,
            weights=checkpoint.place.weights,
            identity=self._plan.identities[checkpoint.id.model],
            rows=rows,
            points=measured.points,
            scores=scores_of(checkpoint.id, measured.scores),
            seconds=measured.seconds,
            directory=self._directory,
        )
        write_record(self._directory, record, measured.report)
        self._write_table()
        said = "; ".join(_in_words(row) for row in rows)
        self._progress.checkpoint(f"{checkpoint.id}: {said}  ({seconds:.0f} s)")

    def _write_table(self) -> None:
        with self._claims.alone():
            records = open_study(self._directory).records
            write_rows(self._directory / RESULTS_NAME, [row for record in records for row in record.rows])
            if self._plan.config.lm_eval:
                write_rows(self._directory / SCORES_NAME, [row for record in records for row in record.scores])


def _in_words(row: dict[str, object]) -> str:
    """Performance and MUI of a task."""
    name, performance, mui = row["performance_axis"], row["performance"], row["mui"]
    said = [str(row["task"])]
    if isinstance(name, str) and isinstance(performance, float):
        short = name.removeprefix("benchmark/")
        said.append(f"{short.replace('_', ' ')} {performance:.3g}")
    said.append(f"MUI {100 * mui:.3g} %" if isinstance(mui, float) else "no MUI")
    return " ".join(said)

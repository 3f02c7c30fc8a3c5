"""One checkpoint: load it, let it answer if it is to, probe it, evaluate it."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import distributed, nn

from mui_callback.benchmarks.run import run_benchmarks
from mui_callback.metrics.phases import Point
from mui_callback.metrics.trajectory import TrajectoryPoint
from mui_callback.parallel.processes import Processes
from mui_callback.probe.model_config import decoder_start
from mui_callback.probe.probe_set import ProbeSet
from mui_callback.probe.run import MUIProbe
from mui_callback.probe.usable import check_scored, measure_usable
from mui_callback.report import MUIReport
from mui_callback.responses.answers import GeneratedAnswer, answered_samples, judged
from mui_callback.responses.cache import AnswerCache, AnswerKey
from mui_callback.responses.generation import generate_answers
from mui_callback.responses.prompts import gold_samples, prompt_tokens
from mui_callback.responses.task import Task
from mui_callback.trajectory.config import StudyConfig
from mui_callback.trajectory.crew import Crew
from mui_callback.trajectory.identity import code_of_answers
from mui_callback.trajectory.listing import StudiedCheckpoint
from mui_callback.trajectory.points import points_of
from mui_callback.trajectory.progress import StudyProgress


@dataclass(frozen=True)
class Measured:
    """What was measured of one checkpoint."""

    report: MUIReport
    points: Mapping[str | None, TrajectoryPoint]
    scores: Mapping[str, Point]
    """Of lm-evaluation-harness."""
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Measuring:
    """How the checkpoints of a study are measured.

    Args:
        config: of the study.
        tasks: read from their files.
        crew: the processes.
        device: of this one.
        processes: how they talk to each other.
        cache: of answers.
        progress: where to show how far it is.
    """

    config: StudyConfig
    tasks: Sequence[Task]
    crew: Crew
    device: str
    processes: Processes
    cache: AnswerCache
    progress: StudyProgress

    def measure(self, checkpoint: StudiedCheckpoint) -> Measured:
        """Measure one.

        Raises:
            InterruptedPassError: see `MUIProbe.measure`, as the following; the study cannot go on.
            DesynchronizedError: …
            Exception: it cannot be loaded or measured.
        """
        clock = _Clock()
        self.progress.begin("loading")
        with clock("load"), self._telling_warnings():
            model = self._load(checkpoint)
            tokenizer = self.processes.together(checkpoint.load_tokenizer)
        try:
            return self._of_model(checkpoint, model, tokenizer, clock)
        finally:
            del model
            gc.collect()
            torch.cuda.empty_cache()

    def _of_model(self, checkpoint: StudiedCheckpoint, model: nn.Module, tokenizer: Any, clock: _Clock) -> Measured:
        answers: dict[str, tuple[GeneratedAnswer, ...]] = {}
        if self.config.response == "generate":
            with clock("generate"):
                answers = {task.name: self._answers(checkpoint, model, tokenizer, task) for task in self.tasks}
        with clock("probe"), self._telling_warnings():
            probe = self.processes.together(lambda: self._probe(checkpoint, model, tokenizer, answers))
            report = measure_usable(probe)
        results: dict[str, Point] = {}
        if self.config.lm_eval:
            self.progress.begin("lm-eval")
            with clock("evaluate"):
                results = self._evaluate(model, tokenizer, probe)
        points = points_of(report, results, answers, self.config.performance)
        return Measured(report, points, results, clock.seconds)

    def _load(self, checkpoint: StudiedCheckpoint) -> nn.Module:
        if self.crew.distribute != "weights":
            return self.processes.together(lambda: checkpoint.load(self.device))
        from mui_callback.trajectory.divided import load_divided  # what it needs of torch takes a second to import

        return load_divided(
            lambda: checkpoint.load("cpu"), checkpoint.load_skeleton, device=self.device, processes=self.processes
        )

    def _probe(
        self,
        checkpoint: StudiedCheckpoint,
        model: nn.Module,
        tokenizer: Any,
        answers: Mapping[str, Sequence[GeneratedAnswer]],
    ) -> MUIProbe:
        samples = {
            task.name: answered_samples(answers[task.name], task)
            if task.name in answers
            else gold_samples(task, tokenizer, chat=checkpoint.config.chat)
            for task in self.tasks
        }
        probe = MUIProbe(model, ProbeSet(samples), tokenizer=tokenizer, **asdict(self.config.probe))
        self.progress.begin("probing")
        probe.on_batch = self.progress.batch
        return probe if answers else check_scored(probe)  # an answer may be empty

    def _answers(
        self, checkpoint: StudiedCheckpoint, model: nn.Module, tokenizer: Any, task: Task
    ) -> tuple[GeneratedAnswer, ...]:
        """From the cache, if they were generated before."""
        chat, max_length = checkpoint.config.chat, self.config.probe.max_length
        is_encoder_decoder = decoder_start(model) is not None
        prompts = self.processes.together(
            lambda: prompt_tokens(task, tokenizer, chat=chat, encoder_decoder=is_encoder_decoder)
        )
        origin = {
            "checkpoint": [checkpoint.id.model, checkpoint.id.label],
            "weights": checkpoint.place.weights,
            "dtype": checkpoint.config.dtype,
            "code": code_of_answers(),
        }
        key = AnswerKey.of(task, prompts, slug=checkpoint.id.slug, origin=origin, max_length=max_length)
        cached = self.processes.from_main(lambda: self.cache.load(key))
        if cached is not None:
            return judged(cached, task)
        n_parts = self.crew.size if self.crew.works_together and self.crew.distribute == "samples" else 1
        own = task.every(n_parts, self.crew.rank if n_parts > 1 else 0)
        told = _added_up(self.progress.batch, len(own.samples))
        self.progress.begin(f"answers to {task.name}")
        with self._telling_warnings():
            answers = self.processes.together(
                lambda: (
                    generate_answers(
                        model,
                        tokenizer,
                        own,
                        chat=chat,
                        batch_tokens=self.config.probe.batch_tokens,
                        max_length=max_length,
                        on_batch=told,
                    )
                    if own.samples
                    else ()
                )
            )
        if n_parts > 1:
            answers = _dealt_in(answers, len(task.samples), n_parts)
        if self.crew.is_main or not self.crew.works_together:
            self.cache.store(key, answers)
        return answers

    def _evaluate(self, model: nn.Module, tokenizer: Any, probe: MUIProbe) -> dict[str, Point]:
        from mui_callback.benchmarks.lm_eval import LMEvalBenchmark
        from mui_callback.benchmarks.tasks import LMEval

        benchmark = self.processes.together(
            lambda: LMEvalBenchmark(LMEval(self.config.lm_eval, limit=self.config.lm_eval_limit), tokenizer)
        )
        results, failures = run_benchmarks([benchmark], model, 0, processes=self.processes, shards=probe.shards)
        if failures:
            raise failures[0].error
        return results

    @contextmanager
    def _telling_warnings(self) -> Iterator[None]:
        """Each once, in a line of its own."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            yield
        for text in dict.fromkeys(str(one.message) for one in caught if one.category is UserWarning):
            self.progress.say(text, style="yellow")


@dataclass(frozen=True)
class _Clock:
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[what] = time.perf_counter() - start


def _added_up(tell: Callable[[int, int], None], total: int) -> Callable[[int], None]:
    """From the number of answers of each batch to that of all so far."""
    done = 0

    def on_batch(n: int) -> None:
        nonlocal done
        done += n
        tell(done, total)

    return on_batch


def _dealt_in(own: Sequence[GeneratedAnswer], n: int, n_processes: int) -> tuple[GeneratedAnswer, ...]:
    """The answers of all processes, in the order of the samples."""
    parts: list[Any] = [None] * n_processes
    distributed.all_gather_object(parts, own)
    return tuple(parts[i % n_processes][i // n_processes] for i in range(n))

"""A task with its rows: prompts with their examples, gold responses, and the answers to compare with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from mui_callback.errors import ProbeSetError
from mui_callback.probe.probe_set import ProbeSet
from mui_callback.probe.readers import row_id
from mui_callback.probe.samples import ProbeSample
from mui_callback.responses.extraction import extract, letter
from mui_callback.responses.rows import Row, example_rows, question_rows
from mui_callback.responses.task_config import TaskConfig
from mui_callback.responses.templates import RowTexts


@dataclass(frozen=True)
class Question:
    """A question as the turns of a conversation."""

    examples: tuple[tuple[str, str], ...]
    """Prompts and responses, before the question."""
    prompt: str
    """Of the question itself."""


@dataclass(frozen=True)
class Task:
    """The N samples of a task."""

    config: TaskConfig
    samples: tuple[ProbeSample, ...]
    """As plain text: the prompt holds the examples, the response is the gold one."""
    questions: tuple[Question, ...]
    """The same prompts in parts, one for each sample."""
    answers: tuple[str | None, ...]
    """One for each sample, to compare with what is extracted from a generated answer; None where nothing is."""

    @property
    def name(self) -> str:
        """Of the task."""
        return self.config.name

    def fingerprint(self, *, of_answers: bool) -> str:
        """SHA-256 (hex) of prompts, gold responses and choices.

        Args:
            of_answers: also of how answers are generated, and of what they are compared with.
        """
        content: list[Any] = [ProbeSet({self.name: self.samples}).fingerprint]
        if of_answers:
            content += [self.config.stop, self.config.max_new_tokens, self.config.extract, self.answers]
        return sha256(json.dumps(content).encode()).hexdigest()

    def every(self, step: int, start: int) -> Task:
        """The task with every so many of its samples, from one of them on."""
        some = slice(start, None, step)
        return Task(self.config, self.samples[some], self.questions[some], self.answers[some])


def read_task(config: TaskConfig) -> Task:
    """Read the rows of a task and make samples of them.

    A JSONL file with the default templates gives what `ProbeSet.from_jsonl` gives.

    Raises:
        ProbeSetError: rows cannot be read, lack a column or make no valid sample; names the task and the row.
    """
    texts = RowTexts(config)
    examples = tuple((texts.prompt(row), texts.response(row)) for row in example_rows(config))
    before = "".join(prompt + response + config.separator for prompt, response in examples)
    samples, questions, answers = [], [], []
    for row in question_rows(config):
        prompt = texts.prompt(row)
        try:
            sample = _sample(texts, row, before + prompt)
            answers.append(_gold_answer(config, texts, row, sample))
        except ProbeSetError as error:
            named = f"task {config.name!r}: "
            raise error if str(error).startswith(named) else ProbeSetError(f"{named}{error}") from error
        samples.append(sample)
        questions.append(Question(examples, prompt))
    return Task(config, tuple(samples), tuple(questions), tuple(answers))


def _sample(texts: RowTexts, row: Row, prompt: str) -> ProbeSample:
    sample_id, response, choices = (
        row_id(row.columns, row.default_id, row.source),
        texts.response(row),
        texts.choices(row),
    )
    if not choices:
        return ProbeSample(sample_id, response, prompt, source=row.source)
    # The choices are checked first, as the answer is looked for in them.
    checked = ProbeSample(sample_id, response, prompt, choices, answer=0, source=row.source).choices
    return ProbeSample(sample_id, response, prompt, checked, texts.answer_index(row, checked), source=row.source)


def _gold_answer(config: TaskConfig, texts: RowTexts, row: Row, sample: ProbeSample) -> str | None:
    kind = config.extract
    if kind == "none":
        return None
    if kind == "choice":
        if sample.answer is None:
            raise ProbeSetError(f"{sample.where}: expected choices, as `extract` is {kind!r}, got none")
        return letter(sample.answer)
    if sample.answer is None and (text := texts.answer_text(row)) is not None:
        if not text.strip():
            raise ProbeSetError(f"{sample.where}: expected an answer to compare with, got {text!r}")
        return text
    gold = sample.response if sample.answer is None else sample.choices[sample.answer]
    found = extract(kind, gold)
    if found is None:
        raise ProbeSetError(
            f"{sample.where}: expected `extract`, {kind!r}, to find something in the gold answer {gold!r}"
        )
    return found

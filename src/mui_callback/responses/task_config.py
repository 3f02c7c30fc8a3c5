"""What a study can be told about one of its tasks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class TaskConfig:
    """One task of a study: where its rows are, and how a row becomes a prompt, a response and an answer.

    Texts are templates of Jinja over the columns of a row, such as ``"Question: {{ question }}\\nAnswer:"``; choices
    and answer are expressions of Jinja, such as ``"choices.text"``.

    Raises:
        ValueError: a value is out of its range, or two say different things.
    """

    name: str
    """Of the task, in tables and figures."""
    dataset: str | None = None
    """A dataset's id on the hub, or a local folder; or else `file`."""
    file: Path | None = None
    """A local JSONL, JSON, CSV or Parquet file."""
    subset: str | None = None
    """Configuration of the dataset."""
    split: str = "test"
    """Of the dataset."""
    revision: str | None = None
    """Branch, tag or commit of the dataset."""
    max_samples: int | None = 200
    """The first so many rows are taken; None for all."""
    prompt: str = "{{ prompt }}"
    """Template of the text before the response."""
    response: str = "{{ response }}"
    """Template of the gold response, which is scored with ``response: gold``; with few-shot prompts, also that of the
    examples."""
    choices: str | None = None
    """Expression for the list of alternatives; without it the columns ``choices`` and ``answer``, where both are
    there."""
    answer: str | None = None
    """Expression for the right one: with choices its index, its letter or its text; without them the text to compare
    with what is extracted from a generated answer. By default that is what is extracted from the gold response."""
    few_shot: int = 0
    """Examples before each question, the first of `few_shot_split` or `few_shot_file`."""
    few_shot_split: str = "train"
    """Split that the examples are from; never the one that is asked."""
    few_shot_file: Path | None = None
    """File that the examples are from, next to `file`."""
    separator: str = "\n\n"
    """Between the examples and the question."""
    extract: str = "text"
    """What of a generated answer is compared: ``"text"``, all of it; ``"number"``, the number after ``####`` or else
    the last one; ``"choice"``, the letter or text of one of the choices; or a regular expression, whose first group (of
    its last match) is taken. ``"none"``: nothing is, and performance is the loss."""
    stop: list[str] = field(default_factory=list)
    """Texts at which a generated answer ends; they are not part of it."""
    max_new_tokens: int = 256
    """Tokens of a generated answer, at most."""

"""What a study can be told about one of its tasks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from mui_callback.probe.probe_set import check_task_name
from mui_callback.responses.extraction import check_extract


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
    spread: bool = False
    """Take them evenly spaced over all rows instead, for rows that are sorted, by subject or by level."""
    prompt: str = "{{ prompt }}"
    """Template of the text before the response."""
    response: str = "{{ response }}"
    """Template of the gold response, which is scored with ``response: gold``; with few-shot prompts, also that of the
    examples."""
    choices: str | None = None
    """Expression for the list of alternatives, each as it follows the prompt: ``choices.text | prefixed(" ")`` puts a
    space before each. Without it the columns ``choices`` and ``answer``, where both are there."""
    answer: str | None = None
    """Expression for the right one: with choices its index from 0, its letter or its text; without them the text to
    compare with what is extracted from a generated answer. By default that is what is extracted from the gold
    response."""
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

    def __post_init__(self) -> None:
        for name in ("file", "few_shot_file"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(path).expanduser())
        check_task_name(self.name)
        if (self.dataset is None) == (self.file is None):
            self._refuse("either `dataset` or `file`", "both" if self.file else "neither")
        if self.file is not None and (self.subset is not None or self.revision is not None):
            self._refuse("`dataset` next to `subset` and `revision`", "`file`")
        for name, value, least in (
            ("max_samples", self.max_samples, 1),
            ("few_shot", self.few_shot, 0),
            ("max_new_tokens", self.max_new_tokens, 1),
        ):
            if value is not None and value < least:
                self._refuse(f"`{name}` to be {least} or more", value)
        self._check_examples()
        check_extract(self.extract, self.name)
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            self._refuse("`stop` to be a list of non-empty texts", self.stop)

    def _check_examples(self) -> None:
        """A question among the examples would be answered by them."""
        if self.few_shot_file is not None and self.file is None:
            self._refuse("`few_shot_split` next to `dataset`", "`few_shot_file`")
        if not self.few_shot:
            return
        if self.file is not None and self.few_shot_file is None:
            self._refuse("`few_shot_file` next to `file`, for the examples", None)
        if self.file is not None and self.few_shot_file is not None:
            if self.file.resolve() == self.few_shot_file.resolve():
                self._refuse("examples of another file than the questions", self.file)
        elif self.split.partition("[")[0] == self.few_shot_split.partition("[")[0]:
            self._refuse("examples of another split than the questions", self.split)

    def _refuse(self, expected: str, came: object) -> NoReturn:
        raise ValueError(f"task {self.name!r}: expected {expected}, got {came}")

"""From a row to its texts: the templates and expressions of a task, in Jinja's sandbox."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from string import ascii_uppercase
from typing import Any

import numpy as np
from jinja2 import StrictUndefined, TemplateError, Undefined
from jinja2.sandbox import SandboxedEnvironment

from mui_callback.errors import ProbeSetError
from mui_callback.forgiving import described
from mui_callback.probe.samples import fail, is_integer
from mui_callback.responses.extraction import normalized
from mui_callback.responses.rows import Row
from mui_callback.responses.task_config import TaskConfig

_PROMPT, _CHOICES, _ANSWER = "prompt", "choices", "answer"
"""Columns that are read without a template; rows need not have them."""


class RowTexts:
    """What the config of a task makes of a row.

    Raises:
        ProbeSetError: a template or an expression is not one of Jinja.
    """

    def __init__(self, config: TaskConfig) -> None:
        self.task = config.name
        # Nothing of a row is code, but a template may be a stranger's.
        environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, finalize=_not_none)
        environment.filters["prefixed"] = _prefixed
        self._prompt = self._compiled("prompt", config.prompt, lambda text: environment.from_string(text).render)
        self._response = self._compiled("response", config.response, lambda text: environment.from_string(text).render)
        self._has_default_prompt = config.prompt == TaskConfig.prompt

        def expression(text: str) -> Callable[..., Any]:
            return environment.compile_expression(text, undefined_to_none=False)

        self._choices = None if config.choices is None else self._compiled("choices", config.choices, expression)
        self._answer = None if config.answer is None else self._compiled("answer", config.answer, expression)

    def prompt(self, row: Row) -> str:
        """The prompt of a row, without examples."""
        if self._has_default_prompt and row.columns.get(_PROMPT) is None:
            return ""
        return str(self._prompt(row))

    def response(self, row: Row) -> str:
        """The gold response of a row."""
        return str(self._response(row))

    def choices(self, row: Row) -> tuple[Any, ...]:
        """The alternatives of a row, each as it follows the prompt; none where the task has no choices."""
        if self._choices is not None:
            found = self._choices(row)
        elif row.columns.get(_CHOICES) is None or row.columns.get(_ANSWER) is None:
            return ()
        else:
            found = row.columns[_CHOICES]
        if isinstance(found, str | bytes | Mapping) or not isinstance(found, Iterable):
            fail(self._where(row), "the choices to be a list of 2 or more strings", found)
        found = tuple(found)
        if len(found) < 2:
            fail(self._where(row), "the choices to be a list of 2 or more strings", list(found))
        return found

    def answer_index(self, row: Row, choices: tuple[str, ...]) -> int:
        """The index of the right choice.

        Raises:
            ProbeSetError: the row says no choice, or several: see `resolved_answer`.
        """
        if self._answer is None and row.columns.get(_ANSWER) is None:
            raise ProbeSetError(f"{self._where(row)}: expected `answer`, an expression, next to `choices`")
        answer = row.columns[_ANSWER] if self._answer is None else self._answer(row)
        return resolved_answer(answer, choices, self._where(row))

    def answer_text(self, row: Row) -> str | None:
        """The text that an answer is compared with; None where the task does not say."""
        if self._answer is None:
            return None
        answer = self._answer(row)
        if isinstance(answer, bool) or not isinstance(answer, str | int | float | np.number):
            fail(self._where(row), "the answer to be a text or a number", answer)
        return str(answer)

    def _where(self, row: Row) -> str:
        return f"task {self.task!r}: {row.source}"

    def _compiled(self, name: str, text: str, compiled: Callable[[str], Callable[..., Any]]) -> Callable[[Row], Any]:
        try:
            run = compiled(text)
        except TemplateError as error:
            raise ProbeSetError(f"task {self.task!r}: `{name}` is not Jinja: {error}: {text!r}") from error

        def of(row: Row) -> Any:
            try:
                value = run(row.columns)
                if isinstance(value, Undefined):
                    value._fail_with_undefined_error()
            except Exception as error:  # of whatever an expression does
                columns = ", ".join(map(repr, row.columns)) or "none"
                raise ProbeSetError(
                    f"{self._where(row)}: expected `{name}`, {text!r}, to have a value, got {described(error)};"
                    f" the row has the columns {columns}"
                ) from error
            return value

        return of


def resolved_answer(answer: Any, choices: tuple[str, ...], where: str) -> int:
    """The index of the right choice.

    Args:
        answer: the index, from 0; a letter, from A; or the text of a choice, but for white space. Digits in a string
            are a text: some datasets count from 0 and some from 1, which an expression such as
            ``choices.label.index(answerKey)`` or ``answer | int`` tells.
        choices: the alternatives.
        where: names the row in messages.

    Raises:
        ProbeSetError: it is none of these, or several.
    """
    expected = f"the answer to be an index into {len(choices)} choices, from 0, or the letter or text of just one"
    if is_integer(answer):
        if not 0 <= answer < len(choices):
            fail(where, expected, answer)
        return int(answer)
    if not isinstance(answer, str):
        fail(where, expected, answer)
    text = normalized(answer)
    named = {index for index, choice in enumerate(choices) if normalized(choice) == text}
    if len(text) == 1 and text.upper() in ascii_uppercase[: len(choices)]:
        named.add(ascii_uppercase.index(text.upper()))
    if len(named) != 1:
        fail(where, expected, answer)
    return named.pop()


def _not_none(value: Any) -> Any:
    if value is None:
        raise ValueError("the value None, where a text is expected")
    return value


def _prefixed(texts: Iterable[str], prefix: str) -> list[str]:
    return [prefix + text for text in texts]

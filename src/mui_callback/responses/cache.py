"""Answers that are kept next to the results, so that no checkpoint is asked twice.

A file has a line of JSON about itself and then one for each answer. What is extracted from an answer, and whether that
is right, is not kept: it is found anew, as the task may say something else by then.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

from mui_callback.file_names import plain_name
from mui_callback.forgiving import described, warn
from mui_callback.probe.samples import IntArray, integers
from mui_callback.responses.answers import Ending, GeneratedAnswer
from mui_callback.responses.task import Task
from mui_callback.whole_file import replaced_at_once

_FORMAT = "mui-answers-1"


@dataclass(frozen=True)
class AnswerKey:
    """What answers depend on."""

    slug: str
    """A name for the file: readable, and different for each checkpoint and task."""
    digest: str
    """Of all of it, SHA-256 (hex)."""

    @classmethod
    def of(
        cls,
        task: Task,
        prompts: Sequence[IntArray],
        *,
        slug: str,
        origin: Mapping[str, Any],
        max_length: int | None = None,
    ) -> AnswerKey:
        """The key of the answers to a task.

        The prompts stand for templates, examples and the tokenizer. In what batches they are answered is left out.

        Args:
            task: of `read_task`.
            prompts: of `prompt_tokens`.
            slug: of the checkpoint.
            origin: what else the answers depend on, as JSON has it: the checkpoint, the revision, the dtype.
            max_length: as for `generate_answers`.

        Raises:
            TypeError: `origin` is not what JSON has.
        """
        depends_on = {
            "origin": origin,
            "ids": [sample.id for sample in task.samples],
            "prompts": [prompt.tolist() for prompt in prompts],
            "stop": list(task.config.stop),
            "max_new_tokens": task.config.max_new_tokens,
            "max_length": max_length,
        }
        digest = sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
        return cls(plain_name(f"{slug}--{task.name}", 120), digest)

    @property
    def file_name(self) -> str:
        """Of the answers."""
        return f"{self.slug}-{self.digest[:16]}.jsonl"


@dataclass(frozen=True)
class AnswerCache:
    """Answers in a directory, a file for each checkpoint and task."""

    directory: Path

    def load(self, key: AnswerKey) -> tuple[GeneratedAnswer, ...] | None:
        """The answers that are kept, not yet `judged`; None where there are none.

        A file that is damaged is as good as none: it is named in a warning.
        """
        file = self.directory / key.file_name
        try:
            head, *rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            expected = _head(key, len(rows))
            if head != expected:
                raise ValueError(f"expected {expected}, got {head!r:.200}")
            return tuple(map(_answer, rows))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            warn(f"MUI: {file} is damaged, so these answers are generated anew ({described(error)})")
            return None

    def store(self, key: AnswerKey, answers: Sequence[GeneratedAnswer]) -> None:
        """Keep answers; replaces those of the same key at once.

        Raises:
            OSError: they cannot be written.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        lines = [_head(key, len(answers)), *map(_row, answers)]
        with replaced_at_once(self.directory / key.file_name) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _head(key: AnswerKey, n_answers: int) -> dict[str, Any]:
    return {"format": _FORMAT, "digest": key.digest, "answers": n_answers}


def _row(answer: GeneratedAnswer) -> dict[str, Any]:
    return {
        "id": answer.id,
        "text": answer.text,
        "ended": answer.ended,
        "n_bytes": answer.n_bytes,
        "n_truncated": answer.n_truncated,
        "response_ids": answer.response_ids.tolist(),
        "prompt_ids": answer.prompt_ids.tolist(),
    }


def _answer(row: Mapping[str, Any]) -> GeneratedAnswer:
    if row["ended"] not in get_args(Ending):
        raise ValueError(f"expected an ending, got {row['ended']!r}")
    return GeneratedAnswer(
        id=row["id"],
        prompt_ids=integers(row["prompt_ids"], row["id"], "prompt_ids"),
        response_ids=integers(row["response_ids"], row["id"], "response_ids"),
        text=row["text"],
        n_bytes=row["n_bytes"],
        ended=row["ended"],
        n_truncated=row["n_truncated"],
    )

"""The probe set: named tasks of held-out samples that are scored again and again during training."""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from importlib.resources import files
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mui_callback.errors import ProbeSetError
from mui_callback.probe.fingerprint import fingerprint
from mui_callback.probe.hub import explained, iterate_rows, load_hub_dataset, read_dataset, select_split
from mui_callback.probe.readers import FilePath, read_jsonl, read_jsonl_file, text_samples, token_sample
from mui_callback.probe.samples import ProbeSample, TokenSample, fail, is_integer

BUILTIN_TASKS = ("english", "code", "arithmetic")


class ProbeSet:
    """An immutable set of probe samples, grouped into named tasks.

    Args:
        tasks: Samples by task name. A name becomes part of metric keys such as "mui/<task>/loss".

    Raises:
        ProbeSetError: If there is no task, a task has no sample or an unusable name, or a sample is of
            another type.
    """

    def __init__(self, tasks: Mapping[str, Iterable[ProbeSample | TokenSample]]) -> None:
        if not isinstance(tasks, Mapping):
            fail("ProbeSet", "a mapping of task names to samples", tasks)
        self._tasks = {check_task_name(task): tuple(samples) for task, samples in tasks.items()}
        if not self._tasks:
            raise ProbeSetError("ProbeSet: expected one or more tasks, got none")
        for task, samples in self._tasks.items():
            if not samples:
                raise ProbeSetError(f"task {task!r}: expected one or more samples, got none")
            for sample in samples:
                if not isinstance(sample, ProbeSample | TokenSample):
                    fail(f"task {task!r}", "ProbeSample or TokenSample objects", sample)

    @classmethod
    def from_jsonl(
        cls,
        paths: FilePath | Sequence[FilePath] | Mapping[str, FilePath],
        max_samples: int | None = None,
    ) -> "ProbeSet":
        """Read JSONL files, one task each, of rows `{id, prompt, response, choices?, answer?}`.

        Only `response` is required; a row without an id is named "<stem>-<line>". Blank lines, unknown
        keys and a byte order mark are allowed.

        Args:
            paths: Files by task name; or one file or several, whose stems are the task names.
            max_samples: Read the first so many samples of each file and none of its later lines.

        Raises:
            ProbeSetError: If a file cannot be read or a row is not valid; names the file and the line.
        """
        _check_max_samples(max_samples)
        if not isinstance(paths, Mapping):
            listed = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
            paths = {Path(path).stem: path for path in listed}
            if len(paths) < len(listed):
                raise ProbeSetError(
                    "from_jsonl: expected files with different stems (they name the tasks) or a mapping of"
                    f" task names to files, got {', '.join(map(str, listed))}"
                )
        return cls({task: read_jsonl_file(path, max_samples) for task, path in paths.items()})

    @classmethod
    def from_texts(cls, texts: Mapping[str, Iterable[str]] | Iterable[str]) -> "ProbeSet":
        """Make a probe set of plain texts, in which every token but the first is scored.

        Args:
            texts: Non-empty texts by task name; or the texts of one task, which is named "text".

        Raises:
            ProbeSetError: If a text is empty or no string.
        """
        by_task = texts if isinstance(texts, Mapping) else {"text": texts}
        return cls({task: text_samples(values, task) for task, values in by_task.items()})

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        *,
        task: str | None = None,
        split: str | None = None,
        name: str | None = None,
        text_column: str | None = None,
        prompt_column: str | None = None,
        response_column: str | None = None,
        choices_column: str | None = None,
        answer_column: str | None = None,
        max_samples: int | None = None,
        revision: str | None = None,
    ) -> "ProbeSet":
        """Make a probe set of one task from a dataset.

        A column that is named here wins. Otherwise the columns prompt and response are read (with
        choices and answer where both are there), or else text, or else input_ids (with labels and
        attention_mask, as in `from_token_rows`).

        Args:
            dataset: A `datasets` dataset (mapped, iterable or a mapping of splits), any sequence or
                iterable of mappings; or an id for `datasets.load_dataset`: a repository on the Hugging
                Face hub or a local folder. No code of the repository is run.
            task: The task's name; by default the last part of the id, or "dataset".
            split: The split to read; needed where there are several.
            name: The dataset's configuration, for an id.
            text_column: The column of plain text.
            prompt_column: The column of prompts.
            response_column: The column of responses.
            choices_column: The column of lists of alternatives; needs `answer_column`.
            answer_column: The column of indices into the choices; needs `choices_column`.
            max_samples: Read the first so many rows; an id is then streamed, not downloaded whole.
            revision: The repository's branch, tag or commit, for an id.

        Raises:
            ProbeSetError: If the columns or the split are not there, a row is not valid, or the
                `datasets` library is needed and not installed, or cannot read the dataset.
        """
        _check_max_samples(max_samples)
        reading: AbstractContextManager[None] = nullcontext()
        if isinstance(dataset, str | os.PathLike):
            hub_id = os.fspath(dataset)
            task = Path(hub_id).name if task is None else task
            reading = explained(hub_id, split)
            dataset = load_hub_dataset(hub_id, split, name, revision, streaming=max_samples is not None)
            split = split if isinstance(dataset, Mapping) else None
        elif name is not None or revision is not None:
            raise ProbeSetError("from_dataset: expected a dataset's id next to name= and revision=")
        task = "dataset" if task is None else task
        columns = {
            "prompt": prompt_column,
            "response": response_column,
            "choices": choices_column,
            "answer": answer_column,
        }
        rows = select_split(dataset, split)
        with reading:
            return cls({task: read_dataset(rows, task, max_samples, text_column, columns)})

    @classmethod
    def from_token_rows(
        cls,
        rows: Iterable[Mapping[str, Any]],
        task: str = "tokens",
        max_samples: int | None = None,
        *,
        encoder_decoder: bool = False,
    ) -> "ProbeSet":
        """Make a probe set of one task from rows of token ids.

        Without labels every token but the first is a response token. A row without any scored token is
        kept: it is a sample with no response token, and is reported as such.

        A row of an encoder-decoder has its prompt in `input_ids` and its response in `labels`. Where it
        also has `decoder_input_ids` or labels of another length it is known as one; where it may not,
        `encoder_decoder` tells. What the decoder starts with is the model's, not the row's.

        Args:
            rows: Mappings of `input_ids` and optionally `labels` (aligned with them, -100 where a token
                is not scored) and `attention_mask` (0 for padding on either side, which is dropped).
                Values are lists, arrays or tensors of shape [T] or [1, T]. An encoder-decoder's `labels`
                have a length of their own and -100 at their end only, unless `decoder_input_ids` (a
                start token and the labels, shifted to the right by it) says what is read there.
            task: The task's name.
            max_samples: Read the first so many rows.
            encoder_decoder: Whether all rows are an encoder-decoder's.

        Raises:
            ProbeSetError: If a row is not valid.
        """
        _check_max_samples(max_samples)
        found = enumerate(islice(iterate_rows(rows, task), max_samples))
        samples = [
            token_sample(row, f"{task}[{index}]", f"{task}-{index}", encoder_decoder=encoder_decoder)
            for index, row in found
        ]
        return cls({task: samples})

    @classmethod
    def builtin(cls, *, only_with_prompt: bool = False) -> "ProbeSet":
        """The package's own small probe set; needs no download.

        Its tasks are "english" (plain prose), "code" (Python functions) and "arithmetic" (questions with
        four choices).

        Args:
            only_with_prompt: Leave out plain text, as an encoder-decoder needs a prompt.
        """
        folder = files("mui_callback.probe") / "builtin"
        tasks = {}
        for task in BUILTIN_TASKS:
            with (folder / f"{task}.jsonl").open("rb") as lines:
                samples = read_jsonl(lines, f"built-in {task}.jsonl", task)
            tasks[task] = [sample for sample in samples if sample.prompt or not only_with_prompt]
        return cls({task: samples for task, samples in tasks.items() if samples})

    @property
    def tasks(self) -> Mapping[str, tuple[ProbeSample | TokenSample, ...]]:
        """The samples by task name, in insertion order (a read-only view)."""
        return MappingProxyType(self._tasks)

    @property
    def task_names(self) -> tuple[str, ...]:
        """The names of the tasks, in order."""
        return tuple(self._tasks)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what is scored: task names, texts, token ids, choices, and their order.

        It does not depend on ids and sources, which can stem from file names, nor on the machine.
        """
        return fingerprint(self._tasks)

    def subset(self, max_samples: int) -> "ProbeSet":
        """The first `max_samples` samples of each task.

        Raises:
            ProbeSetError: If `max_samples` is not 1 or more.
        """
        _check_max_samples(max_samples)
        return ProbeSet({task: samples[:max_samples] for task, samples in self._tasks.items()})

    def __or__(self, other: "ProbeSet") -> "ProbeSet":
        """The tasks of both probe sets.

        Raises:
            ProbeSetError: If both have a task of the same name.
        """
        if not isinstance(other, ProbeSet):
            return NotImplemented
        both = [task for task in self._tasks if task in other._tasks]
        if both:
            raise ProbeSetError(f"expected probe sets with different task names, both have {both[0]!r}")
        return ProbeSet({**self._tasks, **other._tasks})

    def __len__(self) -> int:
        """The number of samples of all tasks."""
        return sum(map(len, self._tasks.values()))

    def __repr__(self) -> str:
        sizes = ", ".join(f"{task}: {len(samples)}" for task, samples in self._tasks.items())
        return f"ProbeSet({sizes}; {self.fingerprint[:12]})"


def check_task_name(task: str) -> str:
    """The name, if a task can have it.

    Raises:
        ProbeSetError: it cannot be a part of metric keys.
    """
    if not isinstance(task, str) or not task.strip() or "/" in task or not task.isprintable():
        fail(
            "task name",
            'a non-blank printable string without "/" (it becomes part of metric keys, mui/<task>/loss)',
            task,
        )
    return task


def _check_max_samples(max_samples: int | None) -> None:
    if max_samples is not None and (not is_integer(max_samples) or max_samples < 1):
        fail("max_samples", "an integer of 1 or more", max_samples)

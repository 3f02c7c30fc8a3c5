"""Answers that are kept: read back as they were, for the same key only, and generated anew where a file is damaged."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mui_callback.responses.answers import GeneratedAnswer, judged
from mui_callback.responses.cache import AnswerCache, AnswerKey
from mui_callback.responses.task import Task, read_task
from mui_callback.responses.task_config import TaskConfig

ORIGIN = {"model": "olmoe", "revision": "step1000", "dtype": "bfloat16"}


@pytest.fixture
def task(tmp_path: Path) -> Task:
    (tmp_path / "sums.jsonl").write_text('{"prompt": "1+1=", "response": "2"}\n{"prompt": "1+2=", "response": "3"}\n')
    return read_task(TaskConfig("sums of two", file=tmp_path / "sums.jsonl", extract="number", stop=["\n"]))


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


PROMPTS = (ids(1, 2, 3), ids(1, 2, 4))


def answers_to(task: Task) -> tuple[GeneratedAnswer, ...]:
    first, second = (sample.id for sample in task.samples)
    return judged(
        [
            GeneratedAnswer(first, PROMPTS[0], ids(7, 8), "é\u2028 2\n", 7, "length", n_truncated=3),
            GeneratedAnswer(second, PROMPTS[1], ids(), "", None, "stop"),
        ],
        task,
    )


def key_of(task: Task, **changes: Any) -> AnswerKey:
    return AnswerKey.of(task, **{"prompts": PROMPTS, "slug": "olmoe--step1000-1a2b3c4d", "origin": ORIGIN, **changes})


def content(answers: tuple[GeneratedAnswer, ...] | None) -> list[dict[str, Any]]:
    assert answers is not None
    return [
        {name: getattr(value, "tolist", lambda v=value: v)() for name, value in vars(one).items()} for one in answers
    ]


def test_answers_come_back_as_they_were(task: Task, tmp_path: Path) -> None:
    cache, key, answers = AnswerCache(tmp_path / "generations"), key_of(task), answers_to(task)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.load(key) is None
        cache.store(key, answers)
        loaded = cache.load(key)
    assert loaded is not None
    assert all(one.extracted is None and one.is_right is None for one in loaded)
    assert content(judged(loaded, task)) == content(answers)
    assert all(one.response_ids.dtype == one.prompt_ids.dtype == np.int64 for one in loaded)
    (file,) = cache.directory.iterdir()
    assert file.name == f"olmoe--step1000-1a2b3c4d--sums-of-two-{key.digest[:16]}.jsonl"
    assert [json.loads(line)["text"] for line in file.read_text().splitlines()[1:]] == ["é\u2028 2\n", ""]


def test_what_answers_depend_on(task: Task) -> None:
    config = task.config
    changed = [
        key_of(replace(task, config=replace(config, stop=["\n", "Q:"]))),
        key_of(replace(task, config=replace(config, max_new_tokens=8))),
        key_of(replace(task, samples=task.samples[::-1])),
        key_of(task, prompts=PROMPTS[::-1]),
        key_of(task, origin={**ORIGIN, "dtype": "float32"}),
        key_of(task, max_length=100),
    ]
    assert len({key_of(task).digest, *(key.digest for key in changed)}) == 1 + len(changed)
    # how they are compared, and where they came from, is nothing to them
    same = replace(task, config=replace(config, extract="text", file=Path("other.jsonl")), answers=("5", "6"))
    assert key_of(same) == key_of(task)
    assert key_of(task, origin=dict(reversed(ORIGIN.items()))) == key_of(task)
    assert key_of(task, slug="other").file_name != key_of(task).file_name


@pytest.mark.parametrize("damage", ["empty", "cut", "half a line", "other key", "no JSON", "ending", "ids", "binary"])
def test_a_damaged_file_is_as_good_as_none(task: Task, tmp_path: Path, damage: str) -> None:
    cache, key = AnswerCache(tmp_path), key_of(task)
    cache.store(key, answers_to(task))
    file = tmp_path / key.file_name
    text = file.read_text()
    damaged = {
        "empty": "",
        "cut": "".join(text.splitlines(keepends=True)[:-1]),
        "half a line": text[:-20],
        "other key": text.replace(key.digest, "0" * 64),
        "no JSON": "{" + text,
        "ending": text.replace('"stop"', '"end"'),
        "ids": text.replace("[7, 8]", '["7"]'),
        "binary": "",
    }
    file.write_text(damaged[damage])
    if damage == "binary":
        file.write_bytes(b"\xff\x00")
    with pytest.warns(UserWarning, match="is damaged, so these answers are generated anew"):
        assert cache.load(key) is None
    cache.store(key, answers_to(task))
    assert cache.load(key) is not None


def test_what_cannot_be_written_leaves_the_file_as_it_is(task: Task, tmp_path: Path) -> None:
    cache, key = AnswerCache(tmp_path), key_of(task)
    cache.store(key, answers_to(task))
    before = (tmp_path / key.file_name).read_bytes()
    with pytest.raises(TypeError):
        cache.store(key, [replace(answers_to(task)[0], text=b"bytes")])  # type: ignore[arg-type]
    assert (tmp_path / key.file_name).read_bytes() == before
    assert len([*tmp_path.iterdir()]) == 2  # and the task's own
    with pytest.raises(TypeError):
        key_of(task, origin={"model": object()})

"""Tasks from files and datasets: what templates make of rows, few-shot prompts, conversations, and what is refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from transformers import ByT5Tokenizer

from made_tokenizer import made_tokenizer
from mui_callback import ProbeSet
from mui_callback.errors import ProbeSetError
from mui_callback.probe.samples import TokenSample
from mui_callback.responses.prompts import gold_samples, prompt_tokens
from mui_callback.responses.task import Task, read_task
from mui_callback.responses.task_config import TaskConfig
from mui_callback.responses.templates import resolved_answer

Rows = Sequence[dict[str, Any]]

SUMS: Rows = [
    {"question": "1+1?", "answer": "One and one.\n#### 2"},
    {"question": "3+4?", "answer": "#### 7"},
    {"question": "9+9?", "answer": "#### 18"},
]
CHOICES: Rows = [
    {"question": "Sky?", "choices": {"text": ["blue", "red"], "label": ["A", "B"]}, "answerKey": "A"},
    {"question": "Blood?", "choices": {"text": ["blue", "red"], "label": ["1", "2"]}, "answerKey": "2"},
]
GSM = {"prompt": "Q: {{ question }}\nA:", "response": " {{ answer }}", "extract": "number"}
ARC = {
    "prompt": "{{ question }}\nAnswer:",
    "response": " {{ choices.text[choices.label.index(answerKey)] }}",
    "choices": 'choices.text | prefixed(" ")',
    "answer": "choices.label.index(answerKey)",
}


def jsonl(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def task_of(tmp_path: Path) -> Callable[..., Task]:
    def made(rows: Rows, **settings: Any) -> Task:
        return read_task(TaskConfig("task", file=jsonl(tmp_path / "rows.jsonl", rows), **settings))

    return made


def test_a_file_with_default_templates_is_a_probe_set(tmp_path: Path) -> None:
    file = tmp_path / "mixed.jsonl"
    file.write_text(
        '\ufeff{"prompt": "2+2=", "response": "4", "choices": ["3", "4"], "answer": 1}\n\n'
        '{"response": "plain {{ text }}\\n"}\n{"id": 7, "prompt": null, "response": "é", "choices": null, "more": 1}\n'
    )
    expected = ProbeSet.from_jsonl({"mixed": file})
    task = read_task(TaskConfig("mixed", file=file))
    assert gold_samples(task, None, chat=False) == expected.tasks["mixed"]
    assert task.samples[0].source == f"{file}:1"
    assert ProbeSet({"mixed": task.samples}).fingerprint == expected.fingerprint
    assert read_task(TaskConfig("mixed", file=file, max_samples=2)).samples == expected.tasks["mixed"][:2]


@pytest.mark.parametrize("kind", ["jsonl", "json", "json lines", "csv", "parquet"])
def test_all_kinds_of_files(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"sums.{kind.split()[0]}"
    if kind == "csv":
        with open(file, "w", newline="") as text:
            writer = csv.DictWriter(text, SUMS[0])
            writer.writeheader()
            writer.writerows(SUMS)
    elif kind == "parquet":
        parquet.write_table(pa.Table.from_pylist([*SUMS]), file)
    elif kind == "json":
        file.write_text("\ufeff" + json.dumps(SUMS))
    else:
        jsonl(file, SUMS)
    task = read_task(TaskConfig("sums", file=file, max_samples=2, **GSM))
    assert [sample.prompt for sample in task.samples] == ["Q: 1+1?\nA:", "Q: 3+4?\nA:"]
    assert [sample.response for sample in task.samples] == [" One and one.\n#### 2", " #### 7"]
    assert task.answers == ("2", "7")
    assert len({sample.id for sample in task.samples}) == 2
    assert all(sample.source.startswith(str(file)) for sample in task.samples)


def test_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    jsonl(folder / "train.jsonl", SUMS[:2])
    jsonl(folder / "test.jsonl", SUMS[2:])
    task = read_task(TaskConfig("sums", dataset=str(folder), few_shot=2, **GSM))
    assert task.samples[0].prompt == "Q: 1+1?\nA: One and one.\n#### 2\n\nQ: 3+4?\nA: #### 7\n\nQ: 9+9?\nA:"
    assert task.samples[0].response == " #### 18"
    with pytest.raises(ProbeSetError, match="task 'sums': cannot read the split 'dev' of "):
        read_task(TaskConfig("sums", dataset=str(folder), split="dev", **GSM))
    with pytest.raises(ProbeSetError, match="expected 3 examples, got 2 in the split 'train' of "):
        read_task(TaskConfig("sums", dataset=str(folder), few_shot=3, **GSM))


def test_choices(task_of: Callable[..., Task]) -> None:
    task = task_of(CHOICES, **ARC, extract="choice")
    assert [sample.choices for sample in task.samples] == [(" blue", " red")] * 2
    assert [sample.answer for sample in task.samples] == [0, 1]
    assert [sample.response for sample in task.samples] == [" blue", " red"]
    assert task.answers == ("A", "B")
    assert task_of(CHOICES, **{**ARC, "response": "{{ question }}"}).answers == ("blue", "red")
    # without an answer in the same form, a column of choices is any other column
    assert task_of(CHOICES, response="{{ answerKey }}").samples[0].choices == ()


def test_few_shot_from_a_file(tmp_path: Path, task_of: Callable[..., Task]) -> None:
    examples = jsonl(tmp_path / "examples.jsonl", SUMS[:2])
    task = task_of(SUMS[2:], few_shot=1, few_shot_file=examples, separator="\n---\n", **GSM)
    assert task.samples[0].prompt == "Q: 1+1?\nA: One and one.\n#### 2\n---\nQ: 9+9?\nA:"
    assert task.questions[0].examples == (("Q: 1+1?\nA:", " One and one.\n#### 2"),)
    assert task.questions[0].prompt == "Q: 9+9?\nA:"


def test_a_template_is_taken_as_it_is(task_of: Callable[..., Task]) -> None:
    task = task_of([{"question": "{{ 1 + 1 }} <b>\r\n"}], prompt=" {{ question }}\n", response="\n{{ 'a' }}\n")
    assert task.samples[0].prompt == " {{ 1 + 1 }} <b>\r\n\n"
    assert task.samples[0].response == "\na\n"


def test_answers_to_compare_with(task_of: Callable[..., Task]) -> None:
    assert task_of(SUMS[:1], response="{{ answer }}").answers == ("One and one. #### 2",)
    assert task_of(SUMS[:1], response="{{ answer }}", extract="none").answers == (None,)
    assert task_of(SUMS[:1], response="{{ answer }}", extract=r"(\w+)\.").answers == ("one",)
    given = task_of(SUMS[:1], response="{{ answer }}", extract="number", answer='answer.split("#### ")[1] | int')
    assert given.answers == ("2",)


@pytest.mark.parametrize(
    ("answer", "index"),
    [(0, 0), (2, 2), (np.int64(1), 1), ("A", 0), ("c", 2), ("two", 1), (" two ", 1), ("B", 1)],
)
def test_an_answer_among_choices(answer: object, index: int) -> None:
    assert resolved_answer(answer, (" one", " two", " B b"), "row 1") == index


@pytest.mark.parametrize("answer", [3, -1, "1", "D", "", "four", None, 1.0, True, "same"])
def test_an_answer_that_is_no_choice_or_two(answer: object) -> None:
    with pytest.raises(
        ProbeSetError, match=r"row 1: expected the answer to be an index into 3 choices, from 0, or the"
    ):
        resolved_answer(answer, ("one", "same", "same"), "row 1")


def test_a_letter_that_is_the_text_of_another_choice_is_ambiguous() -> None:
    with pytest.raises(ProbeSetError, match="of just one, got str 'A'"):
        resolved_answer("A", ("B", "A"), "row 1")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"prompt": "{{ quest }}"},
            r"rows.jsonl:2: expected `prompt`, '{{ quest }}'.*'quest' is undefined; the row has",
        ),
        (
            {"choices": "options"},
            r"expected `choices`, 'options'.*'options' is undefined; .* 'question', 'answer', 'n'",
        ),
        ({"response": "{{ n }}"}, r"`response`, '{{ n }}', to have a value, got ValueError: the value None, where"),
        ({"response": "{{ n + 1 }}"}, "unsupported operand"),
        ({"prompt": "{{ answer.__class__.__mro__ }}"}, "unsafe"),
        ({"choices": "question"}, "expected the choices to be a list of 2 or more strings, got str '1"),
        ({"choices": "[1]"}, "expected the choices to be a list of 2 or more strings, got list"),
        ({"choices": "[1, 2]"}, r"`choices\[0\]` to be a non-empty string"),
        ({"choices": '["1", "2"]'}, "expected the answer to be an index into 2 choices"),
        ({"extract": "choice"}, "expected choices, as `extract` is 'choice', got none"),
        ({"extract": r"answer: (\d)"}, "to find something in the gold answer 'One and one"),
        ({"answer": "n"}, "expected the answer to be a text or a number, got None"),
        ({"answer": '" "'}, "expected an answer to compare with"),
    ],
)
def test_a_row_that_does_not_fit(task_of: Callable[..., Task], settings: dict[str, Any], message: str) -> None:
    rows = [{"quest": "0", **SUMS[0], "n": 1}, {**SUMS[1], "n": None}]
    with pytest.raises(ProbeSetError, match=f"(?s)^task 'task': (?!task).*{message}"):
        task_of(rows, **{"response": "{{ answer }}", **settings})


@pytest.mark.parametrize("settings", [{"prompt": "{{ question"}, {"answer": "question +"}])
def test_what_is_not_jinja(task_of: Callable[..., Task], settings: dict[str, Any]) -> None:
    with pytest.raises(ProbeSetError, match=r"task 'task': `(prompt|answer)` is not Jinja: "):
        task_of(SUMS, **settings)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"response": "x"}\n{', r"a.jsonl:2: expected a JSON object, got invalid JSON"),
        ("a.jsonl", "[1]\n", r"a.jsonl:1: expected an object of named values, got list"),
        ("a.jsonl", "\n", "expected rows, got none in "),
        ("a.jsonl", '{"response": ""}', r"a.jsonl:1 \(id 'a-1'\): expected `response` to be a non-empty string"),
        ("a.json", "[{", "expected a list of JSON objects, got invalid JSON"),
        ("a.json", "[1]", r"a.json\[1\]: expected an object"),
        ("a.csv", "response,b\nx,1\ny\n", "a.csv:3: expected 2 values, as in the first line"),
        ("a.csv", 'response\n"x" y\n', "a.csv:2: expected comma-separated values"),
        ("a.parquet", "no", "a.parquet: expected a Parquet file"),
        ("a.txt", "x", "expected a file that ends in .jsonl, .json, .csv, .parquet, got "),
    ],
)
def test_a_file_that_does_not_fit(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ProbeSetError, match=f"^task 't': .*{message}"):
        read_task(TaskConfig("t", file=tmp_path / name))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ProbeSetError, match=r"task 't': cannot read .*none.jsonl"):
        read_task(TaskConfig("t", file=tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either `dataset` or `file`, got neither"),
        ({"dataset": "a", "file": Path("a.csv")}, "either `dataset` or `file`, got both"),
        ({"file": Path("a.csv"), "revision": "main"}, "`dataset` next to `subset` and `revision`"),
        ({"dataset": "a", "max_samples": 0}, "`max_samples` to be 1 or more, got 0"),
        ({"dataset": "a", "few_shot": -1}, "`few_shot` to be 0 or more, got -1"),
        ({"dataset": "a", "max_new_tokens": 0}, "`max_new_tokens` to be 1 or more, got 0"),
        ({"dataset": "a", "few_shot": 1, "split": "train[9:]"}, r"examples of another split .*, got train\[9:\]"),
        ({"dataset": "a", "few_shot_file": Path("a.csv")}, "`few_shot_split` next to `dataset`"),
        ({"file": Path("a.csv"), "few_shot": 1}, "`few_shot_file` next to `file`"),
        ({"file": Path("a.csv"), "few_shot": 1, "few_shot_file": Path("b/../a.csv")}, "of another file than"),
        ({"dataset": "a", "extract": "nubmer"}, "expected `extract` to be "),
        ({"dataset": "a", "stop": "\n"}, "`stop` to be a list of non-empty texts"),
        ({"dataset": "a", "stop": [""]}, "`stop` to be a list of non-empty texts"),
        ({"dataset": "a", "name": "a/b"}, "non-blank printable string without"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskConfig(**{"name": "task", **settings})


def test_a_conversation(tmp_path: Path, task_of: Callable[..., Task]) -> None:
    tokenizer = made_tokenizer()
    examples = jsonl(tmp_path / "examples.jsonl", SUMS[:2])
    task = task_of(SUMS[2:], few_shot=2, few_shot_file=examples, **GSM)
    (sample,) = gold_samples(task, tokenizer, chat=True)
    assert isinstance(sample, TokenSample)
    turns = [
        ("user", "Q: 1+1?\nA:"),
        ("assistant", "One and one.\n#### 2"),
        ("user", "Q: 3+4?\nA:"),
        ("assistant", "#### 7"),
        ("user", "Q: 9+9?\nA:"),
    ]
    messages = [{"role": role, "content": text} for role, text in turns]
    # transformers' own tokens of the conversation
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    response = tokenizer("#### 18", add_special_tokens=False)["input_ids"]
    assert sample.input_ids.tolist() == prompt + response
    assert np.flatnonzero(sample.scored).tolist() == [*range(len(prompt), len(prompt) + len(response))]
    assert sample.input_ids.tolist().count(tokenizer.bos_token_id) == 1
    assert (sample.n_bytes, sample.id, sample.source) == (7, task.samples[0].id, task.samples[0].source)
    assert prompt_tokens(task, tokenizer, chat=True)[0].tolist() == prompt


def test_choices_in_a_conversation(task_of: Callable[..., Task]) -> None:
    tokenizer = made_tokenizer()
    sample = gold_samples(task_of(CHOICES, **ARC), tokenizer, chat=True)[1]
    assert isinstance(sample, TokenSample)
    assert sample.answer == 1
    assert [tokenizer.decode(choice.input_ids[choice.scored]) for choice in sample.choices] == ["blue", "red"]


def test_conversations_that_cannot_be(task_of: Callable[..., Task]) -> None:
    task = task_of(SUMS, **GSM)
    with pytest.raises(
        ProbeSetError, match="task 'task': expected a tokenizer with a chat template, got ByT5Tokenizer"
    ):
        gold_samples(task, ByT5Tokenizer(), chat=True)
    with pytest.raises(ProbeSetError, match=r"rows.jsonl:1 .*the chat template does not take these turns: .*no user"):
        gold_samples(task, made_tokenizer("{{ raise_exception('no user') }}"), chat=True)
    with pytest.raises(ProbeSetError, match="a conversation begins with a question"):
        gold_samples(task_of(SUMS, response="{{ answer }}"), made_tokenizer(), chat=True)


def test_prompts_of_plain_text(task_of: Callable[..., Task]) -> None:
    task = task_of(SUMS[:1], **GSM)
    bytes_of_prompt = [byte + 3 for byte in b"Q: 1+1?\nA:"]
    assert prompt_tokens(task, ByT5Tokenizer(), chat=False)[0].tolist() == bytes_of_prompt
    assert prompt_tokens(task, ByT5Tokenizer(), chat=False, encoder_decoder=True)[0].tolist() == [*bytes_of_prompt, 1]
    with_bos = made_tokenizer()
    assert prompt_tokens(task, with_bos, chat=False)[0].tolist() == with_bos("Q: 1+1?\nA:")["input_ids"]
    with pytest.raises(ProbeSetError, match="expected a prompt: there is nothing to answer"):
        prompt_tokens(task_of(SUMS, response="{{ answer }}"), with_bos, chat=False)
    with pytest.raises(ProbeSetError, match="expected a tokenizer for what the model is to answer, got none"):
        prompt_tokens(task, None, chat=False)


@settings(max_examples=50)
@given(n_rows=st.integers(1, 30), max_samples=st.integers(1, 40))
def test_spread_rows(n_rows: int, max_samples: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("spread") / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": str(n), "response": "x"}) + "\n" for n in range(n_rows)))
    config = TaskConfig("a", file=file, max_samples=max_samples, spread=True)
    taken = [int(sample.prompt) for sample in read_task(config).samples]
    assert len(taken) == min(n_rows, max_samples)
    assert taken[0] == 0
    apart = np.diff([*taken, n_rows])
    assert apart.min() >= 1
    assert apart.max() - apart.min() <= 1

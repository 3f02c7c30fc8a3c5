"""The probe set: its rows, readers, names, fingerprint and built-in samples."""

import ast
import copy
import doctest
import json
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mui_callback.errors import MUIError, ProbeSetError
from mui_callback.probe.probe_set import ProbeSet
from mui_callback.probe.samples import ProbeSample, TokenChoice, TokenSample

CHOICES = {"choices": [" a", " b", " c"], "answer": 1}


def write(path: Path, *rows: Any) -> Path:
    path.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
    return path


def rejected(make: Callable[[], object]) -> str:
    with pytest.raises(ProbeSetError) as caught:
        make()
    return str(caught.value)


def responses(probe_set: ProbeSet, task: str) -> list[str]:
    return [sample.response for sample in probe_set.tasks[task] if isinstance(sample, ProbeSample)]


def tokens(*ids: int, scored: list[bool] | None = None) -> TokenSample:
    mask = [False] + [True] * (len(ids) - 1) if scored is None else scored
    return TokenSample("t", np.array(ids), np.array(mask))


# JSONL


def test_jsonl_reads_every_field_and_names_the_line(tmp_path: Path) -> None:
    rows = [
        {"id": "first", "prompt": "Q:", "response": " b", **CHOICES, "topic": "kept elsewhere"},
        b"\r\n",
        {"id": 7, "response": "plain \u2028 text"},
        {"response": "x", "id": None, "prompt": None, "choices": None, "answer": None},
    ]
    path = write(tmp_path / "quiz.jsonl", *rows)
    source = str(path)
    assert ProbeSet.from_jsonl({"mine": path}).tasks == {
        "mine": (
            ProbeSample("first", " b", "Q:", (" a", " b", " c"), 1, f"{source}:1"),
            ProbeSample("7", "plain \u2028 text", source=f"{source}:3"),
            ProbeSample("quiz-4", "x", source=f"{source}:4"),
        )
    }


def test_jsonl_stems_name_the_tasks_in_order(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.jsonl", {"response": name}) for name in ("b", "a")]
    assert ProbeSet.from_jsonl(paths).task_names == ("b", "a")
    assert ProbeSet.from_jsonl(str(paths[1])).task_names == ("a",)
    assert "different stems" in rejected(lambda: ProbeSet.from_jsonl([paths[0], str(paths[0])]))


def test_jsonl_allows_a_byte_order_mark_at_the_start_only(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    good = write(tmp_path / "good.jsonl", mark + b'{"response": "x"}\n')
    assert ProbeSet.from_jsonl(good).tasks["good"][0].id == "good-1"
    bad = write(tmp_path / "bad.jsonl", {"response": "x"}, mark + b'{"response": "x"}\n')
    assert f"{bad}:2: expected a JSON object" in rejected(lambda: ProbeSet.from_jsonl(bad))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (b'{"response": "caf\xe9"}', "UTF-8 text, got 'utf-8' codec can't decode byte 0xe9"),
        (b'{"response": "x"', "a JSON object, got invalid JSON"),
        (b"[" * 100_000, "a JSON object, got invalid JSON"),
        (["response"], "an object of named values, got list ['response']"),
        ({"prompt": "Q", "id": "x"}, "the key 'response', got only 'prompt', 'id'"),
        ({"response": None}, "the key 'response', got only an empty object"),
        ({"response": ""}, "`response` to be a non-empty string, got str ''"),
        ({"response": 5}, "`response` to be a non-empty string, got int 5"),
        (b'{"response": "\\ud83d"}', "`response` to be text that UTF-8 can encode"),
        ({"response": "x", "prompt": 5}, "`prompt` to be a string, got int 5"),
        ({"response": "x", "id": 1.5}, "`id` to be a string or an integer, got float 1.5"),
        ({"response": "x", "id": True}, "`id` to be a string or an integer, got bool True"),
        ({"response": "x", "id": ""}, "`id` to be a non-empty string"),
        ({"response": "x", "choices": "ab", "answer": 0}, "'choices' to be a list of 2 or more strings"),
        ({"response": "x", "choices": ["a"], "answer": 0}, "'choices' to be a list of 2 or more strings"),
        ({"response": "x", "choices": [], "answer": 0}, "'choices' to be a list of 2 or more strings"),
        (
            {"response": "x", "choices": ["a", 1], "answer": 0},
            "`choices[1]` to be a non-empty string, got int",
        ),
        (
            {"response": "x", "choices": ["a", ""], "answer": 0},
            "`choices[1]` to be a non-empty string, got str",
        ),
        ({"response": "x", "choices": ["a", "b"]}, "`answer` next to `choices`"),
        ({"response": "x", "answer": 0}, "`choices` next to `answer`"),
        ({"response": "x", **CHOICES, "answer": 3}, "`answer` to be an index into the 3 choices, got int 3"),
        (
            {"response": "x", **CHOICES, "answer": -1},
            "`answer` to be an index into the 3 choices, got int -1",
        ),
        ({"response": "x", **CHOICES, "answer": "1"}, "`answer` to be an index into the 3 choices, got str"),
        (
            {"response": "x", **CHOICES, "answer": True},
            "`answer` to be an index into the 3 choices, got bool",
        ),
    ],
)
def test_jsonl_names_file_and_line_of_a_bad_row(tmp_path: Path, row: Any, expected: str) -> None:
    path = write(tmp_path / "bad.jsonl", {"response": "fine"}, b"\n", row)
    message = rejected(lambda: ProbeSet.from_jsonl(path))
    assert message.startswith(f"{path}:3")
    assert f": expected {expected}" in message


def test_jsonl_rejects_files_that_hold_nothing(tmp_path: Path) -> None:
    empty = write(tmp_path / "empty.jsonl", b"\n  \n")
    assert f"{empty}: expected one JSON object per line, got an empty file" in rejected(
        lambda: ProbeSet.from_jsonl(empty)
    )
    missing = tmp_path / "missing.jsonl"
    assert f"{missing}: cannot read" in rejected(lambda: ProbeSet.from_jsonl(missing))
    assert f"{tmp_path}: cannot read" in rejected(lambda: ProbeSet.from_jsonl({"folder": tmp_path}))


def test_max_samples_reads_no_further(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"response": "1"}, {"response": "2"}, b"not JSON\n")
    assert [s.id for s in ProbeSet.from_jsonl(path, max_samples=2).tasks["a"]] == ["a-1", "a-2"]


@pytest.mark.parametrize("max_samples", [0, -1, 1.5, True])
def test_max_samples_is_a_positive_integer(max_samples: Any) -> None:
    expected = "max_samples: expected an integer of 1 or more"
    assert expected in rejected(lambda: ProbeSet.from_jsonl("a.jsonl", max_samples=max_samples))
    assert expected in rejected(lambda: ProbeSet.from_dataset(ROWS, max_samples=max_samples))
    assert expected in rejected(lambda: ProbeSet.from_token_rows([], max_samples=max_samples))


# Texts


def test_texts_are_plain_samples() -> None:
    probe_set = ProbeSet.from_texts({"wiki": ["one", "two"], "news": ("three",)})
    assert probe_set.tasks["wiki"][1] == ProbeSample("wiki-1", "two", source="wiki[1]")
    assert probe_set.task_names == ("wiki", "news")
    assert ProbeSet.from_texts(["one"]).task_names == ("text",)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ("a text", "text: expected a list of texts, got str 'a text'"),
        ({"wiki": "a text"}, "wiki: expected a list of texts, got str 'a text'"),
        ({"wiki": ["a", ""]}, "wiki[1] (id 'wiki-1'): expected `response` to be a non-empty string"),
        ([["a"]], "text[0] (id 'text-0'): expected `response` to be a non-empty string, got list ['a']"),
        ([], "task 'text': expected one or more samples, got none"),
        ({}, "expected one or more tasks, got none"),
    ],
)
def test_texts_that_are_none(texts: Any, expected: str) -> None:
    assert expected in rejected(lambda: ProbeSet.from_texts(texts))


# Datasets

ROWS = [{"prompt": f"Q{i}", "response": f"A{i}", "text": f"T{i}", "choices": ["a", "b"], "answer": 1} for i in range(3)]


def without(*columns: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in columns} for row in ROWS]


class MapStyle(torch.utils.data.Dataset[dict[str, Any]]):
    """Has items and a length but is not iterable, and never raises IndexError."""

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return ROWS[index % len(ROWS)]


@pytest.mark.parametrize(
    "dataset",
    [
        ROWS,
        iter(ROWS),
        MapStyle(),
        datasets.Dataset.from_list(ROWS),
        datasets.Dataset.from_list(ROWS).with_format("numpy"),
        datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
        datasets.DatasetDict({"only": datasets.Dataset.from_list(ROWS)}),
    ],
    ids=["list", "iterator", "map-style", "Dataset", "numpy format", "IterableDataset", "DatasetDict"],
)
def test_dataset_of_any_kind(dataset: Any) -> None:
    probe_set = ProbeSet.from_dataset(dataset, task="mine", max_samples=2)
    assert probe_set.tasks["mine"] == tuple(
        ProbeSample(f"mine-{i}", f"A{i}", f"Q{i}", ("a", "b"), 1, f"mine[{i}]") for i in range(2)
    )


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        (ROWS, {"text_column": "prompt"}, ProbeSample("0", "Q0")),
        (ROWS, {"response_column": "text"}, ProbeSample("0", "T0", "Q0", ("a", "b"), 1)),
        (ROWS, {"response_column": "prompt"}, ProbeSample("0", "Q0", "", ("a", "b"), 1)),
        (without("choices"), {}, ProbeSample("0", "A0", "Q0")),
        (without("prompt", "answer"), {}, ProbeSample("0", "A0")),
        (without("response"), {}, ProbeSample("0", "T0")),
        (
            [{"question": "Q", "choices": ["x"], "answer": "18"}],
            {"prompt_column": "question", "response_column": "answer"},
            ProbeSample("0", "18", "Q"),
        ),
        (
            [{"response": "A", "choices": ["a", "b"], "answer": "context"}],
            {"prompt_column": "answer"},
            ProbeSample("0", "A", "context"),
        ),
        (
            [{"response": "A", "options": ["a", "b"], "label": 0}],
            {"choices_column": "options", "answer_column": "label"},
            ProbeSample("0", "A", "", ("a", "b"), 0),
        ),
    ],
)
def test_dataset_columns(rows: Any, columns: dict[str, Any], expected: ProbeSample) -> None:
    sample = ProbeSet.from_dataset(rows, **columns).tasks["dataset"][0]
    assert isinstance(sample, ProbeSample)
    for field in ("response", "prompt", "choices", "answer"):
        assert getattr(sample, field) == getattr(expected, field), field


def test_dataset_columns_of_later_rows_count() -> None:
    rows = [{"response": "plain"}, {"response": "A", "choices": ["a", "b"], "answer": 0}]
    sample = ProbeSet.from_dataset(rows).tasks["dataset"][1]
    assert isinstance(sample, ProbeSample)
    assert sample.choices == ("a", "b")


@pytest.mark.parametrize(
    ("dataset", "options", "expected"),
    [
        ([{"body": "x", "n": 1}], {}, "found only: 'body', 'n'"),
        (
            [{"body": "x"}],
            {},
            "expected the columns 'response' (with 'prompt', 'choices', 'answer'), 'text' or",
        ),
        ([{"body": "x"}], {"text_column": "tex"}, "expected the column 'tex', found only: 'body'"),
        ([{"body": "x"}], {"prompt_column": "body"}, "expected the column 'response' or response_column="),
        (ROWS, {"text_column": "text", "prompt_column": "prompt"}, "either text_column= or other columns"),
        (ROWS, {"choices_column": "choices"}, "choices_column= and answer_column= together"),
        ([{"text": "x"}, {"text": None}], {}, "dataset[1]: expected the key 'text'"),
        (
            [{"text": "x"}, {"text": 3}],
            {"task": "t"},
            "t[1] (id 't-1'): expected `response` to be a non-empty",
        ),
        (["x"], {}, "found only: no columns"),
        ([], {}, "dataset: expected rows, got an empty dataset"),
        (5, {}, "dataset: expected a dataset or a sequence of rows, got int 5"),
        (
            {"train": ROWS, "test": ROWS},
            {},
            "expected split= to name a split, the dataset has: 'train', 'test'",
        ),
        ({"train": ROWS}, {"split": "test"}, "expected a split named 'test', the dataset has: 'train'"),
        (ROWS, {"split": "test"}, "expected a hub id or a mapping of splits for split='test'"),
        (ROWS, {"name": "main"}, "expected a dataset's id next to name= and revision="),
    ],
)
def test_dataset_that_does_not_fit(dataset: Any, options: dict[str, Any], expected: str) -> None:
    assert expected in rejected(lambda: ProbeSet.from_dataset(dataset, **options))


def test_dataset_split_is_picked() -> None:
    probe_set = ProbeSet.from_dataset({"train": ROWS, "test": without("response")}, split="test")
    assert responses(probe_set, "dataset") == ["T0", "T1", "T2"]


def test_dataset_of_token_ids() -> None:
    rows = datasets.Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}])
    sample = ProbeSet.from_dataset(rows, task="tok").tasks["tok"][0]
    assert isinstance(sample, TokenSample)
    assert (sample.input_ids.tolist(), sample.scored.tolist()) == ([5, 6, 7], [False, False, True])


@pytest.mark.parametrize("max_samples", [None, 2])
def test_dataset_by_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_samples: int | None) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "my-data"
    folder.mkdir()
    write(folder / "train.jsonl", *ROWS)
    write(folder / "test.jsonl", *without("response"))
    streamed: list[bool] = []
    load_dataset = datasets.load_dataset

    def spy(*args: Any, **options: Any) -> Any:
        streamed.append(options["streaming"])
        assert "trust_remote_code" not in options
        return load_dataset(*args, **options)

    monkeypatch.setattr(datasets, "load_dataset", spy)
    for split in ("train", "test"):
        probe_set = ProbeSet.from_dataset(str(folder), split=split, text_column="text", max_samples=max_samples)
        assert responses(probe_set, "my-data") == ["T0", "T1", "T2"][:max_samples]
    assert "the dataset has: 'train', 'test'" in rejected(
        lambda: ProbeSet.from_dataset(folder, max_samples=max_samples)
    )
    assert streamed == [max_samples is not None] * 3


def test_remote_code_is_refused_where_the_library_could_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def old_load_dataset(path: str, name: str | None, trust_remote_code: bool | None = None, **_: Any) -> Any:
        asked.append((path, name, trust_remote_code))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", old_load_dataset)
    assert ProbeSet.from_dataset("org/name", name="main", split="test").task_names == ("name",)
    assert asked == [("org/name", "main", False)]


def test_a_dataset_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    said = rejected(lambda: ProbeSet.from_dataset(str(tmp_path / "empty")))
    assert said.startswith(f"cannot read {tmp_path}/empty: EmptyDatasetError: ")


@pytest.mark.parametrize("max_samples", [None, 2])
def test_a_dataset_that_is_broken_is_named_with_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_samples: int | None
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a"}\n{"text": \n')
    said = rejected(lambda: ProbeSet.from_dataset(folder, split="train", max_samples=max_samples))
    assert said.startswith(f"cannot read the split 'train' of {folder}: ")
    assert "JSON parse error" in said


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'mui-callback[study]'" in rejected(lambda: ProbeSet.from_dataset("org/name"))


# Token rows


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda row: torch.tensor([row])])
def test_token_rows_of_any_array(kind: Callable[[list[int]], Any]) -> None:
    row = {
        "input_ids": kind([0, 0, 5, 6, 7, 8, 0]),
        "labels": kind([9, 0, 5, -100, 7, 8, 9]),
        "attention_mask": kind([0, 0, 1, 1, 1, 1, 0]),
    }
    sample = ProbeSet.from_token_rows([row]).tasks["tokens"][0]
    assert isinstance(sample, TokenSample)
    assert sample.input_ids.tolist() == [5, 6, 7, 8]
    assert sample.scored.tolist() == [False, False, True, True]
    assert (sample.input_ids.dtype, sample.scored.dtype) == (np.dtype(np.int64), np.dtype(np.bool_))
    assert (sample.id, sample.source, sample.n_bytes) == ("tokens-0", "tokens[0]", None)


def test_token_rows_without_labels_score_all_but_the_first() -> None:
    rows = ({"input_ids": ids, "attention_mask": np.array(mask)} for ids, mask in [([4, 5, 6], [True] * 3)])
    sample = ProbeSet.from_token_rows(rows).tasks["tokens"][0]
    assert isinstance(sample, TokenSample)
    assert sample.scored.tolist() == [False, True, True]


def test_token_rows_with_nothing_to_score_are_kept() -> None:
    rows: list[dict[str, list[int]]] = [
        {"input_ids": [4, 5], "labels": [-100, -100]},
        {"input_ids": [4, 5], "labels": [4, -100]},
        {"input_ids": [4]},
        {"input_ids": []},
        {"input_ids": [4, 5], "attention_mask": [0, 0]},
    ]
    probe_set = ProbeSet.from_token_rows(rows, task="t")
    assert [sample.scored.any() for sample in probe_set.tasks["t"]] == [False] * 5  # type: ignore[union-attr]
    assert len(ProbeSet.from_token_rows(rows, max_samples=3)) == 3


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([1, 2], "an object of named values, got list [1, 2]"),
        ({"labels": [1]}, "the key 'input_ids', got only 'labels'"),
        ({"input_ids": [1.0, 2.0]}, "`input_ids` to be integers of shape [T] or [1, T]"),
        (
            {"input_ids": torch.ones(2, dtype=torch.bfloat16)},
            "`input_ids` to be integers of shape [T] or [1, T]",
        ),
        ({"input_ids": [True, False]}, "`input_ids` to be integers of shape [T] or [1, T]"),
        ({"input_ids": [[1, 2], [3]]}, "`input_ids` to be integers of shape [T] or [1, T]"),
        ({"input_ids": [[1, 2], [3, 4]]}, "`input_ids` to be integers of shape [T] or [1, T]"),
        ({"input_ids": [1, -2]}, "token ids to be 0 or more, got int -2"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "`attention_mask` to be as long as `input_ids` (2), got 1"),
        ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, "each label to be -100 or its own token"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "`attention_mask` to be 1 with zeros only"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 2, 2]}, "`attention_mask` to be 1 with zeros only"),
    ],
)
def test_token_rows_that_are_not_valid(row: Any, expected: str) -> None:
    message = rejected(lambda: ProbeSet.from_token_rows([{"input_ids": [1, 2]}, row], task="t"))
    assert message.startswith("t[1]")
    assert f": expected {expected}" in message


# Rows of an encoder-decoder


@pytest.mark.parametrize(
    ("row", "encoder_ids", "input_ids", "scored"),
    [
        ({"input_ids": [5, 6, 1], "labels": [7, 1]}, [5, 6, 1], [7, 1], [True, True]),
        ({"input_ids": [5, 1], "labels": [7, 8, 1]}, [5, 1], [7, 8, 1], [True, True, True]),
        ({"input_ids": torch.tensor([[5, 1]]), "labels": torch.tensor([[7]])}, [5, 1], [7], [True]),
        # Padding: of the prompt on either side, of the labels at the end.
        ({"input_ids": [0, 5, 1, 0], "attention_mask": [0, 1, 1, 0], "labels": [7]}, [5, 1], [7], [True]),
        ({"input_ids": [5, 1], "labels": [7, 1, -100, -100]}, [5, 1], [7, 1], [True, True]),
        ({"input_ids": [5, 1], "labels": [-100, -100, -100]}, [5, 1], [], []),
        # What the decoder reads stands where labels do not.
        (
            {"input_ids": [5, 1], "labels": [7, 8, 1], "decoder_input_ids": [0, 7, 8]},
            [5, 1],
            [7, 8, 1],
            [True, True, True],
        ),
        (
            {"input_ids": [5, 1], "labels": [-100, 8, -100, 1, -100], "decoder_input_ids": [0, 7, 8, 9, 1]},
            [5, 1],
            [7, 8, 9, 1],
            [False, True, False, True],
        ),
        ({"input_ids": [5, 1], "labels": [-100, -100], "decoder_input_ids": [0, 7]}, [5, 1], [], []),
    ],
)
def test_rows_that_look_like_an_encoder_decoders(
    row: Any, encoder_ids: list[int], input_ids: list[int], scored: list[bool]
) -> None:
    for encoder_decoder in (False, True):
        (sample,) = ProbeSet.from_token_rows([row], encoder_decoder=encoder_decoder).tasks["tokens"]
        assert isinstance(sample, TokenSample)
        assert sample.encoder_ids is not None
        assert sample.encoder_ids.tolist() == encoder_ids
        assert (sample.input_ids.tolist(), sample.scored.tolist()) == (input_ids, scored)


def test_rows_that_may_be_either_are_told_apart_by_the_caller() -> None:
    row = {"input_ids": [5, 6, 1], "labels": [-100, 6, 1]}
    both = {"input_ids": [5, 6, 1], "labels": [5, 6, 1]}
    (causal,) = ProbeSet.from_token_rows([row]).tasks["tokens"]
    assert isinstance(causal, TokenSample)
    assert causal.encoder_ids is None
    (apart,) = ProbeSet.from_token_rows([both], encoder_decoder=True).tasks["tokens"]
    assert isinstance(apart, TokenSample)
    assert apart.encoder_ids is not None
    assert (apart.encoder_ids.tolist(), apart.input_ids.tolist(), apart.scored.all()) == ([5, 6, 1], [5, 6, 1], True)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"input_ids": [1, 2]}, "the key 'labels', an encoder-decoder's response, got only 'input_ids'"),
        ({"input_ids": [1], "decoder_input_ids": [0, 1]}, "the key 'labels', an encoder-decoder's response"),
        ({"input_ids": [1, 2], "labels": [-100, 3]}, "labels of -100 at the end only, or `decoder_input_ids`"),
        ({"input_ids": [1], "labels": [3, -3]}, "token ids to be 0 or more, got int -3"),
        ({"input_ids": [-1], "labels": [3, 3]}, "token ids to be 0 or more, got int -1"),
        ({"input_ids": [1], "labels": [3, 4], "decoder_input_ids": [0]}, "as long as `decoder_input_ids` (1), got 2"),
        (
            {"input_ids": [1], "labels": [3, 4], "decoder_input_ids": [3, 4]},
            "`decoder_input_ids` to be a start token and then `labels`, got 1 other tokens",
        ),
        ({"input_ids": [1, 2], "attention_mask": [0, 0], "labels": [3]}, "`encoder_ids` to hold 1 or more tokens"),
        ({"input_ids": [1, 2], "attention_mask": [1], "labels": [3]}, "`attention_mask` to be as long as `input_ids`"),
        ({"input_ids": [1], "labels": [1.5, 2.5]}, "`labels` to be integers of shape [T] or [1, T]"),
    ],
)
def test_rows_of_an_encoder_decoder_that_are_not_valid(row: Any, expected: str) -> None:
    good = {"input_ids": [1, 2], "labels": [3]}
    message = rejected(lambda: ProbeSet.from_token_rows([good, row], task="t", encoder_decoder=True))
    assert message.startswith("t[1]")
    assert expected in message


@pytest.mark.parametrize("rows", [{"input_ids": [1, 2]}, "abc", 5])
def test_token_rows_are_rows(rows: Any) -> None:
    assert "t: expected a dataset or a sequence of rows" in rejected(lambda: ProbeSet.from_token_rows(rows, task="t"))


# Samples


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: tokens(1, 2, scored=[True, True]), "expected scored[0] to be False"),
        (lambda: tokens(1, 2, scored=[False]), "expected `scored` to be bool of shape (2,)"),
        (lambda: TokenSample("t", np.array([1, 2]), np.array([0, 1])), "expected `scored` to be bool"),
        (lambda: TokenSample("t", np.array([1]), np.array([False]), n_bytes=-1), "`n_bytes` to be None or 0"),
        (lambda: TokenSample("t", np.array([1]), np.array([False]), n_truncated=-1), "`n_truncated` to be 0"),
        (lambda: TokenSample("t", np.array([1]), np.array([False]), choices=(1, 2)), "TokenChoice objects"),  # type: ignore[arg-type]
        (lambda: TokenSample("t", np.array([1]), np.array([False]), answer=0), "`choices` next to `answer`"),
        (
            lambda: TokenChoice(np.array([1.5]), np.array([False])),
            "choice: expected `input_ids` to be integers",
        ),
        (
            lambda: TokenSample("t", np.array([1]), np.array([True]), encoder_ids=np.array([])),
            "`encoder_ids` to hold 1 or more tokens, got none",
        ),
        (
            lambda: TokenChoice(np.array([1]), np.array([True]), encoder_ids=np.array([[1], [2]])),
            "`encoder_ids` to be integers of shape [T] or [1, T]",
        ),
        (lambda: ProbeSample("a", "x", choices=("y",), answer=0), "`choices` to hold 2 or more alternatives"),
        (lambda: ProbeSample("a", "x", choices="yz", answer=0), "`choices` to be a list of 2 or more"),  # type: ignore[arg-type]
    ],
)
def test_samples_check_their_fields(make: Callable[[], object], expected: str) -> None:
    assert expected in rejected(make)


def test_token_arrays_are_copied_and_read_only() -> None:
    ids = np.array([1, 2, 3])
    sample = TokenSample("t", ids, np.array([False, True, True]), encoder_ids=ids)
    ids[0] = 9
    assert sample.encoder_ids is not None
    assert sample.input_ids.tolist() == sample.encoder_ids.tolist() == [1, 2, 3]
    for array in (sample.input_ids, sample.scored, sample.encoder_ids):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


# The probe set


@pytest.mark.parametrize("name", ["", "  ", "a/b", "a\nb", 5])
def test_task_names_that_cannot_be_metric_keys(name: Any) -> None:
    message = rejected(lambda: ProbeSet({name: [tokens(1, 2)]}))
    assert 'task name: expected a non-blank printable string without "/"' in message
    assert repr(name) in message


def test_probe_set_checks_its_samples() -> None:
    assert "a mapping of task names to samples, got list" in rejected(lambda: ProbeSet(["x"]))  # type: ignore[arg-type]
    assert "task 't': expected ProbeSample or TokenSample objects, got str 'x'" in rejected(
        lambda: ProbeSet({"t": ["x"]})  # type: ignore[list-item]
    )
    assert issubclass(ProbeSetError, MUIError)
    assert issubclass(ProbeSetError, ValueError)


def test_probe_set_is_read_only_and_travels_between_processes() -> None:
    probe_set = ProbeSet.from_texts({"b": ["x", "y"], "a": ["z"]})
    with pytest.raises(TypeError):
        probe_set.tasks["c"] = ()  # type: ignore[index]
    with pytest.raises(AttributeError):
        probe_set.tasks = {}  # type: ignore[misc]
    for twin in (pickle.loads(pickle.dumps(probe_set)), copy.deepcopy(probe_set)):
        assert twin.tasks == probe_set.tasks
        assert twin.fingerprint == probe_set.fingerprint


def test_subset_union_length_and_repr() -> None:
    probe_set = ProbeSet.from_texts({"b": ["x", "y"], "a": ["z"]})
    assert (len(probe_set), len(probe_set.subset(1)), len(probe_set.subset(9))) == (3, 2, 3)
    assert probe_set.subset(1).tasks["b"] == probe_set.tasks["b"][:1]
    assert "max_samples" in rejected(lambda: probe_set.subset(0))
    both = ProbeSet.from_texts(["q"]) | probe_set
    assert both.task_names == ("text", "b", "a")
    assert "both have 'b'" in rejected(lambda: both | probe_set)
    assert repr(probe_set) == f"ProbeSet(b: 2, a: 1; {probe_set.fingerprint[:12]})"


# The fingerprint


def test_fingerprint_is_the_same_on_every_machine() -> None:
    probe_set = ProbeSet(
        {
            "t": [
                ProbeSample("a", "é", "Q", ("x", "y"), 1),
                TokenSample("b", np.array([1, 2]), np.array([False, True])),
            ]
        }
    )
    assert probe_set.fingerprint == "b80b01f6a8ee4165731078eb9be49c7e0f513981faefe8cdf9dfc17b6a6e829c"


def test_fingerprint_of_causal_tokens_is_what_it_was_before_encoders() -> None:
    choices = _choice(1, 2), _choice(1, 3)
    sample = TokenSample("b", np.array([1, 2]), np.array([False, True]), 5, choices=choices, answer=1)
    expected = "34c42e6ee518776363f6cd03daddcd6883f062ae24f1e90de22c9e0f93c36436"
    assert ProbeSet({"t": [sample]}).fingerprint == expected


def test_fingerprint_ignores_where_the_samples_were_read(tmp_path: Path) -> None:
    one = ProbeSet.from_jsonl({"t": write(tmp_path / "one.jsonl", {"response": "x"})})
    two = ProbeSet.from_jsonl({"t": write(tmp_path / "two.jsonl", b"\n", {"id": "named", "response": "x", "more": 1})})
    assert one.fingerprint == two.fingerprint


def _choice(*ids: int, **fields: Any) -> TokenChoice:
    return TokenChoice(np.array(ids), np.array([False] * (len(ids) - 1) + [True]), **fields)


def _apart(encoder_ids: list[int]) -> TokenSample:
    return TokenSample("t", np.array([1, 2]), np.array([False, False]), encoder_ids=np.array(encoder_ids))


def _with_choices(first: TokenChoice, second: TokenChoice, answer: int) -> TokenSample:
    return TokenSample("t", np.array([1, 2]), np.array([False, True]), choices=(first, second), answer=answer)


def test_fingerprint_changes_with_any_content() -> None:
    text = ProbeSample("a", "xy", "Q", ("x", "y"), 0)
    variants: list[dict[str, list[ProbeSample | TokenSample]]] = [
        {"t": [text]},
        {"u": [text]},
        {"t": [text, text]},
        {"t": [text], "u": [text]},
        {"u": [text], "t": [text]},
        {"t": [ProbeSample("a", "xz", "Q", ("x", "y"), 0)]},
        {"t": [ProbeSample("a", "xy", "R", ("x", "y"), 0)]},
        {"t": [ProbeSample("a", "y", "Qx", ("x", "y"), 0)]},
        {"t": [ProbeSample("a", "xy", "Q", ("x", "z"), 0)]},
        {"t": [ProbeSample("a", "xy", "Q", ("y", "x"), 0)]},
        {"t": [ProbeSample("a", "xy", "Q", ("x", "y"), 1)]},
        {"t": [ProbeSample("a", "xy", "Q")]},
        {"t": [ProbeSample("a", "xy", "Q"), text]},
        {"t": [text, ProbeSample("a", "xy", "Q")]},
        {"t": [tokens(1, 2)]},
        {"t": [tokens(1, 3)]},
        {"t": [tokens(1, 2, scored=[False, False])]},
        {"t": [TokenSample("t", np.array([1, 2]), np.array([False, True]), n_bytes=3)]},
        {"t": [_with_choices(_choice(1, 2), _choice(1, 3), 0)]},
        {"t": [_with_choices(_choice(1, 2), _choice(1, 3), 1)]},
        {"t": [_with_choices(_choice(1, 2), _choice(1, 4), 0)]},
        {"t": [_apart([5])]},
        {"t": [_apart([6])]},
        {"t": [_apart([])]},
        {"t": [_with_choices(_choice(1, 2, encoder_ids=np.array([5])), _choice(1, 3), 0)]},
    ]
    assert len({ProbeSet(tasks).fingerprint for tasks in variants}) == len(variants)


@given(st.lists(st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=3), min_size=1, max_size=3))
def test_fingerprint_and_jsonl_round_trip(tmp_path_factory: pytest.TempPathFactory, tasks: list[list[str]]) -> None:
    folder = tmp_path_factory.mktemp("probes")
    texts = {f"task {index}": values for index, values in enumerate(tasks)}
    direct = ProbeSet.from_texts(texts)
    paths = {
        task: write(folder / f"{task}.jsonl", *({"response": text} for text in values))
        for task, values in texts.items()
    }
    assert ProbeSet.from_jsonl(paths).fingerprint == direct.fingerprint


# The built-in probe set


def _builtin(task: str) -> list[ProbeSample]:
    return [sample for sample in ProbeSet.builtin().tasks[task] if isinstance(sample, ProbeSample)]


def test_builtin_tasks_and_sizes() -> None:
    probe_set = ProbeSet.builtin()
    assert {task: len(samples) for task, samples in probe_set.tasks.items()} == {
        "english": 20,
        "code": 20,
        "arithmetic": 20,
    }
    for task, samples in probe_set.tasks.items():
        assert len({sample.id for sample in samples}) == len(samples), task
        assert all(sample.source.startswith(f"built-in {task}.jsonl:") for sample in samples)
    assert all(sample.prompt == "" and sample.response.count(". ") >= 2 for sample in _builtin("english"))


@pytest.mark.parametrize("sample", _builtin("code"), ids=lambda sample: sample.id)
def test_builtin_code_passes_its_own_doctest(sample: ProbeSample) -> None:
    names: dict[str, Any] = {}
    exec(compile(sample.prompt + sample.response, sample.id, "exec"), names)
    examples = doctest.DocTestParser().get_doctest(sample.prompt.split('"""')[1], names, sample.id, None, None)
    assert examples.examples
    assert doctest.DocTestRunner(verbose=False).run(examples).failed == 0


def _evaluate(node: ast.expr) -> int:
    if isinstance(node, ast.Constant):
        assert isinstance(node.value, int)
        return node.value
    if isinstance(node, ast.UnaryOp):
        return -_evaluate(node.operand)
    assert isinstance(node, ast.BinOp)
    left, right = _evaluate(node.left), _evaluate(node.right)
    operations = {ast.Add: left + right, ast.Sub: left - right, ast.Mult: left * right}
    return (
        operations[type(node.op)] if type(node.op) in operations else divmod(left, right)[isinstance(node.op, ast.Mod)]
    )


def test_builtin_arithmetic_is_right_and_balanced() -> None:
    import mui_callback.probe

    path = Path(mui_callback.probe.__path__[0]) / "builtin" / "arithmetic.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    ranks = []
    for row in rows:
        assert row["prompt"].startswith("Question: ")
        assert row["prompt"].endswith("?\nAnswer:")
        assert row["response"] == row["choices"][row["answer"]]
        numbers = [int(number) for choice in row["choices"] for number in re.findall(r"\d+", choice)]
        assert len(set(numbers)) == 4
        assert numbers[row["answer"]] == _evaluate(ast.parse(row["expression"], mode="eval").body), row["id"]
        ranks.append(sorted(numbers).index(numbers[row["answer"]]))
    # Neither the place of the right answer nor its size among the choices gives it away.
    assert sorted(row["answer"] for row in rows) == sorted(ranks) == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5

"""Turn rows (lines of JSON, mappings of text, mappings of token ids) into probe samples."""

import codecs
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np

from mui_callback.errors import ProbeSetError
from mui_callback.probe.samples import BoolArray, IntArray, ProbeSample, TokenSample, fail, integers, is_integer

FilePath = str | os.PathLike[str]

IGNORE_INDEX = -100  # the label that transformers and PyTorch's cross entropy leave out of the loss


@dataclass(frozen=True)
class Columns:
    """The keys of a row that hold a text sample; None for a part that the rows do not have."""

    response: str = "response"
    prompt: str | None = "prompt"
    choices: str | None = "choices"
    answer: str | None = "answer"


def read_jsonl(lines: Iterable[bytes], name: str, stem: str, max_samples: int | None = None) -> tuple[ProbeSample, ...]:
    """Read one JSON object per line; blank lines and unknown keys are allowed.

    Args:
        lines: The file's lines as bytes, so that a line that is not UTF-8 has a number.
        name: The file's name, for messages and `ProbeSample.source`.
        stem: Names a sample without an id: "<stem>-<line>".
        max_samples: Stop after this many samples; the lines after them are not read.

    Raises:
        ProbeSetError: If a line is no valid sample or there is none; names the file and the line.
    """
    samples = tuple(islice(_jsonl_samples(lines, name, stem), max_samples))
    if not samples:
        raise ProbeSetError(f"{name}: expected one JSON object per line, got an empty file")
    return samples


def read_jsonl_file(path: FilePath, max_samples: int | None = None) -> tuple[ProbeSample, ...]:
    """Read a JSONL file as `read_jsonl` does.

    Raises:
        ProbeSetError: As for `read_jsonl`, or if the file cannot be read.
    """
    name = os.fspath(path)
    try:
        with open(path, "rb") as lines:
            return read_jsonl(lines, name, Path(path).stem, max_samples)
    except OSError as error:
        raise ProbeSetError(f"{name}: cannot read this probe file: {error}") from error


def _jsonl_samples(lines: Iterable[bytes], name: str, stem: str) -> Iterable[ProbeSample]:
    for number, row in json_lines(lines, name):
        yield text_sample(row, Columns(), f"{name}:{number}", f"{stem}-{number}")


def json_lines(lines: Iterable[bytes], name: str) -> Iterator[tuple[int, Any]]:
    """The number of each line that is not blank, from 1, and what is in it.

    Raises:
        ProbeSetError: If a line is no JSON; names the file and the line.
    """
    for number, line in enumerate(lines, start=1):
        where = f"{name}:{number}"
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise ProbeSetError(f"{where}: expected UTF-8 text, got {error}") from error
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ProbeSetError(f"{where}: expected a JSON object, got invalid JSON: {error}") from error
        yield number, row


def text_sample(row: Any, columns: Columns, source: str, default_id: str) -> ProbeSample:
    """Make a sample from a row of text.

    A key with the value None counts as absent.

    Raises:
        ProbeSetError: If the row is no mapping or does not hold a valid sample.
    """
    row = _mapping(row, source)
    if row.get(columns.response) is None:
        raise ProbeSetError(f"{source}: expected the key {columns.response!r}, {_present(row)}")
    prompt, choices, answer = (
        None if column is None else row.get(column) for column in (columns.prompt, columns.choices, columns.answer)
    )
    if choices is not None:
        choices = choices.tolist() if isinstance(choices, np.ndarray) else choices
        if not isinstance(choices, list | tuple) or len(choices) < 2:
            fail(source, f"{columns.choices!r} to be a list of 2 or more strings", choices)
    return ProbeSample(
        id=row_id(row, default_id, source),
        response=row[columns.response],
        prompt="" if prompt is None else prompt,
        choices=tuple(choices or ()),
        answer=answer,
        source=source,
    )


def text_samples(texts: Iterable[str], task: str) -> tuple[ProbeSample, ...]:
    """Make samples of plain texts.

    Raises:
        ProbeSetError: If a text is empty or no string, or `texts` is itself one.
    """
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        fail(task, "a list of texts", texts)
    return tuple(
        ProbeSample(id=f"{task}-{index}", response=text, source=f"{task}[{index}]") for index, text in enumerate(texts)
    )


def token_sample(row: Any, source: str, default_id: str, *, encoder_decoder: bool = False) -> TokenSample:
    """Make a sample from a row of token ids.

    Args:
        row: As in `ProbeSet.from_token_rows`.
        source: Where the row is from, for messages.
        default_id: The sample's id if the row has none.
        encoder_decoder: Whether the row is an encoder-decoder's even if it does not look like one.

    Raises:
        ProbeSetError: If the row is no mapping or does not hold a valid sample.
    """
    row = _mapping(row, source)
    if row.get("input_ids") is None:
        raise ProbeSetError(f"{source}: expected the key 'input_ids', {_present(row)}")
    input_ids = integers(row["input_ids"], source, "input_ids")
    kept = slice(None)
    if row.get("attention_mask") is not None:
        mask = integers(row["attention_mask"], source, "attention_mask", kinds="iub")
        kept = _unpadded(_aligned(mask, "attention_mask", input_ids, "input_ids", source), source)
    labels = None if row.get("labels") is None else integers(row["labels"], source, "labels")
    sample_id = row_id(row, default_id, source)
    is_apart = labels is not None and labels.shape != input_ids.shape
    if encoder_decoder or is_apart or row.get("decoder_input_ids") is not None:
        return TokenSample(sample_id, *_decoded(row, labels, source), source=source, encoder_ids=input_ids[kept])
    scored = np.ones(len(input_ids), dtype=np.bool_)
    if labels is not None:
        scored = labels != IGNORE_INDEX
        differ = np.flatnonzero((scored & (labels != input_ids))[kept])
        if differ.size:
            raise ProbeSetError(
                f"{source}: expected each label to be -100 or its own token (labels are aligned with"
                f" `input_ids`, not shifted) unless the rows are an encoder-decoder's (encoder_decoder=True),"
                f" got {differ.size} labels of other tokens"
            )
    scored = scored[kept].copy()
    scored[:1] = False
    return TokenSample(sample_id, input_ids[kept], scored, source=source)


def _decoded(row: Mapping[str, Any], labels: IntArray | None, source: str) -> tuple[IntArray, BoolArray]:
    """The response of an encoder-decoder's row and which of its tokens are scored, up to the last that is."""
    if labels is None:
        raise ProbeSetError(f"{source}: expected the key 'labels', an encoder-decoder's response, {_present(row)}")
    length = int(np.flatnonzero(labels != IGNORE_INDEX).max(initial=-1)) + 1
    response = labels[:length]
    scored = response != IGNORE_INDEX
    if row.get("decoder_input_ids") is not None:
        decoder_ids = integers(row["decoder_input_ids"], source, "decoder_input_ids")
        _aligned(labels, "labels", decoder_ids, "decoder_input_ids", source)
        # The label of a position is what is read at the next one; nothing reads the last.
        response = np.append(decoder_ids[1:length], response[-1:])
        differ = np.flatnonzero(scored & (response != labels[:length]))
        if differ.size:
            raise ProbeSetError(
                f"{source}: expected `decoder_input_ids` to be a start token and then `labels`,"
                f" got {differ.size} other tokens"
            )
    elif not scored.all():
        raise ProbeSetError(
            f"{source}: expected labels of -100 at the end only, or `decoder_input_ids` to say what the decoder"
            f" reads in their place, got {np.count_nonzero(~scored)} before other labels"
        )
    return response, scored


def _mapping(row: Any, source: str) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        fail(source, "an object of named values", row)
    return cast("Mapping[str, Any]", row)


def _present(row: Mapping[str, Any]) -> str:
    return "got only " + (", ".join(repr(k) for k, v in row.items() if v is not None) or "an empty object")


def row_id(row: Mapping[str, Any], default: str, source: str) -> str:
    """The id that a row has, or else the default.

    Raises:
        ProbeSetError: If it has one that is neither a string nor an integer.
    """
    value = row.get("id")
    if value is None:
        return default
    if not is_integer(value) and not isinstance(value, str):
        fail(source, "`id` to be a string or an integer", value)
    return str(value)


def _aligned(array: IntArray, name: str, other: IntArray, other_name: str, source: str) -> IntArray:
    if array.shape != other.shape:
        raise ProbeSetError(
            f"{source}: expected `{name}` to be as long as `{other_name}` ({len(other)}), got {len(array)}"
        )
    return array


def _unpadded(attention_mask: IntArray, source: str) -> slice:
    ones = np.flatnonzero(attention_mask)
    start, stop = (int(ones[0]), int(ones[-1]) + 1) if ones.size else (0, 0)
    if not (attention_mask[start:stop] == 1).all():
        raise ProbeSetError(
            f"{source}: expected `attention_mask` to be 1 with zeros only before and after,"
            f" got values {np.unique(attention_mask).tolist()} or zeros in between"
        )
    return slice(start, stop)

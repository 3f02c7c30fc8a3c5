"""The rows of a task, from a dataset or a file, with where each was read."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mui_callback.errors import MUIError, ProbeSetError
from mui_callback.probe.hub import explained, load_hub_dataset
from mui_callback.probe.readers import json_lines
from mui_callback.probe.samples import fail
from mui_callback.responses.task_config import TaskConfig


@dataclass(frozen=True)
class Row:
    """One row of a dataset or a file."""

    columns: Mapping[str, Any]
    """Values by name."""
    source: str
    """Where it was read, such as "gsm8k.jsonl:17"."""
    default_id: str
    """Of a sample whose row has no id."""


def question_rows(config: TaskConfig) -> list[Row]:
    """The rows of a task, `max_samples` of them: the first, or evenly spaced.

    Raises:
        ProbeSetError: they cannot be read, or there are none.
    """
    rows = _rows(config, config.file, config.split, None if config.spread else config.max_samples)
    if not rows:
        raise ProbeSetError(f"task {config.name!r}: expected rows, got none in {_place(config)}")
    n = len(rows) if config.max_samples is None else min(config.max_samples, len(rows))
    return [rows[number * len(rows) // n] for number in range(n)] if config.spread else rows


def example_rows(config: TaskConfig) -> list[Row]:
    """The first rows of the split or file that the examples are from.

    Raises:
        ProbeSetError: they cannot be read, or are fewer than `few_shot`.
    """
    if not config.few_shot:
        return []
    rows = _rows(config, config.few_shot_file, config.few_shot_split, config.few_shot)
    if len(rows) < config.few_shot:
        place = config.few_shot_file or f"the split {config.few_shot_split!r} of {config.dataset}"
        raise ProbeSetError(f"task {config.name!r}: expected {config.few_shot} examples, got {len(rows)} in {place}")
    return rows


def _place(config: TaskConfig) -> str:
    return str(config.file or f"the split {config.split!r} of {config.dataset}")


def _rows(config: TaskConfig, file: Path | None, split: str, n: int | None) -> list[Row]:
    found = _dataset_rows(config, split, n) if file is None else _file_rows(file)
    try:
        return [*islice(found, n)]
    except MUIError as error:
        raise ProbeSetError(f"task {config.name!r}: {error}") from error
    except OSError as error:
        raise ProbeSetError(f"task {config.name!r}: cannot read {file or config.dataset}: {error}") from error


def _dataset_rows(config: TaskConfig, split: str, n: int | None) -> Iterator[Row]:
    assert config.dataset is not None
    # As many as are needed are streamed; a dataset that is read whole is kept on the disk.
    rows = load_hub_dataset(config.dataset, split, config.subset, config.revision, streaming=n is not None)
    with explained(config.dataset, split):
        found = [*islice(rows, n)]
    for index, row in enumerate(found):
        yield _row(row, f"{config.dataset} {split}[{index}]", f"{config.name}-{index}")


def _file_rows(file: Path) -> Iterator[Row]:
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    if file.suffix.lower() not in readers:
        raise ProbeSetError(f"expected a file that ends in {', '.join(readers)}, got {file}")
    for number, source, row in readers[file.suffix.lower()](file):
        yield _row(row, source, f"{file.stem}-{number}")


_Read = Iterator[tuple[int, str, Any]]
"""Numbers of rows, where they are, and what they are."""


def _jsonl(file: Path) -> _Read:
    with open(file, "rb") as lines:
        for number, row in json_lines(lines, str(file)):
            yield number, f"{file}:{number}", row


def _json(file: Path) -> _Read:
    """A list of objects; or lines of them, which go by this name too."""
    text = file.read_bytes().removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text.startswith(b"["):
        yield from _jsonl(file)
        return
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProbeSetError(f"{file}: expected a list of JSON objects, got invalid JSON: {error}") from error
    yield from _numbered(rows, file)


def _csv(file: Path) -> _Read:
    with open(file, encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, strict=True)
        try:
            for row in reader:
                source = f"{file}:{reader.line_num}"
                if None in row or None in row.values():
                    raise ProbeSetError(
                        f"{source}: expected {len(reader.fieldnames or ())} values, as in the first line"
                    )
                yield reader.line_num, source, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise ProbeSetError(
                f"{file}:{reader.line_num + 1}: expected comma-separated values, got {error}"
            ) from error


def _parquet(file: Path) -> _Read:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ProbeSetError(f"reading {file} needs pyarrow: pip install 'mui-callback[study]'") from error
    try:
        with parquet.ParquetFile(file) as table:
            yield from _numbered((row for batch in table.iter_batches(1024) for row in batch.to_pylist()), file)
    except ArrowException as error:
        raise ProbeSetError(f"{file}: expected a Parquet file: {error}") from error


def _numbered(rows: Iterable[Any], file: Path) -> _Read:
    for number, row in enumerate(rows, start=1):
        yield number, f"{file}[{number}]", row


def _row(row: Any, source: str, default_id: str) -> Row:
    if not isinstance(row, Mapping):
        fail(source, "an object of named values", row)
    return Row(row, source, default_id)

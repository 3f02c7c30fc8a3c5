"""Write samples as JSONL files that `ProbeSet.from_jsonl` reads back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from mui_callback.errors import ProbeSetError
from mui_callback.probe.samples import ProbeSample, TokenSample


def sample_row(sample: ProbeSample | TokenSample) -> dict[str, object]:
    """The fields of a sample as `ProbeSet.from_jsonl` names them; choices only where it has some.

    Raises:
        ProbeSetError: the sample is of tokens.
    """
    if not isinstance(sample, ProbeSample):
        raise ProbeSetError(f"{sample.where}: expected a sample of text, as JSONL holds no tokens")
    row: dict[str, object] = {"id": sample.id, "prompt": sample.prompt, "response": sample.response}
    return row if sample.answer is None else {**row, "choices": sample.choices, "answer": sample.answer}


def write_rows(path: Path, rows: Iterable[Mapping[str, object]], *, replace: bool = False) -> None:
    """Write one row a line.

    Raises:
        FileExistsError: the file is there, and is not to be replaced.
    """
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    with path.open("w" if replace else "x", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)

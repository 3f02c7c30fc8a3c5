"""The file of a report: numpy arrays and a JSON header in one archive, no pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from mui_callback.errors import MUIError
from mui_callback.whole_file import replaced_at_once

_FORMAT = "mui-report-3"

Arrays = dict[str, NDArray[Any]]


def write_report(path: str | os.PathLike[str], header: Mapping[str, Any], arrays: Arrays) -> None:
    """Write a header and arrays; replaces the file at once, or leaves it as it is.

    Raises:
        OSError: it cannot be written.
    """
    text = json.dumps({"format": _FORMAT, **header}).encode()
    with replaced_at_once(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, header=np.frombuffer(text, np.uint8), **arrays)


def read_report(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Arrays]:
    """The header and the arrays that `write_report` wrote.

    Raises:
        MUIError: the file is something else, or was written by another version of this format.
        OSError: there is none, or it cannot be read.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays: Arrays = dict(archive)
        header = json.loads(arrays.pop("header").tobytes())
    except (ValueError, KeyError, EOFError, TypeError, BadZipFile) as error:
        raise MUIError(f"{path}: expected a report written by MUIReport.save, got something else ({error})") from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        got = header.get("format") if isinstance(header, dict) else header
        raise MUIError(f"{path}: expected format {_FORMAT!r}, got {got!r}")
    return header, arrays

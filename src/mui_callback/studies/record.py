"""What a study found as a JSON file, for those who draw their own pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mui_callback.errors import MUIError
from mui_callback.model_options import ModelOptions
from mui_callback.version import __version__


def check_writable(path: Path | None, suffix: str) -> None:
    """To be called before what takes long.

    Raises:
        MUIError: the file has another suffix, or its directory is not there.
    """
    if path is not None and not (path.suffix.lower() == suffix and path.parent.is_dir() and not path.is_dir()):
        raise MUIError(f"expected a {suffix} file in a directory that is there, got {path}")


def write_study(path: Path, name: str, options: ModelOptions, found: Mapping[str, Any]) -> None:
    """Write what was found, with what it was found on.

    Args:
        path: the file, which is replaced.
        name: of the command.
        options: the model.
        found: dataclasses, mappings, sequences, arrays and plain values. Of a dataclass the fields and the properties
            are written, under their names.
    """
    header = {"study": name, "mui_callback": __version__, "model": asdict(options)}
    path.write_text(json.dumps(header | _plain(found), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        properties = [name for name, member in vars(type(value)).items() if isinstance(member, property)]
        return {name: _plain(getattr(value, name)) for name in (*(field.name for field in fields(value)), *properties)}
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(one) for one in value]
    return value

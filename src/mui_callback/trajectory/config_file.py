"""The keys of a config file, checked before anything is read from it: each unknown one by its line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from mui_callback.errors import MUIError
from mui_callback.forgiving import in_a_line
from mui_callback.trajectory.config import StudyConfig


def check_config_file(file: Path) -> None:
    """Check that all keys of a file are those of `StudyConfig`.

    Raises:
        MUIError: the file cannot be read, is no YAML, or has a key that is not known; says where, and what was meant.
    """
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise MUIError(f"{file}: expected the config of a study, got {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MUIError(f"{file}: expected YAML, got something else: {in_a_line(error)}") from error
    if not isinstance(root, yaml.MappingNode):
        raise MUIError(f"{file}: expected the config of a study, with the keys {', '.join(_names(StudyConfig))}")
    complaints = [f"{file}:{line}: {what}" for line, what in _unknown(root, StudyConfig, "")]
    if complaints:
        raise MUIError("\n".join(complaints))


def nearest(name: str, known: Sequence[str]) -> str:
    """What was perhaps meant by a name that is not known, in words."""
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"there is {', '.join(known)}"


def _unknown(node: Any, kind: Any, where: str) -> Iterator[tuple[int, str]]:
    """Lines, from 1, and what is wrong in them."""
    if isinstance(node, yaml.SequenceNode) and get_origin(kind) is list:
        for number, item in enumerate(node.value, start=1):
            yield from _unknown(item, get_args(kind)[0], f"entry {number} of{where}")
    elif isinstance(node, yaml.MappingNode) and is_dataclass(kind):
        hints = get_type_hints(kind)
        seen: set[str] = set()
        for key, value in node.value:
            line, name = key.start_mark.line + 1, str(key.value)
            of = f" in {where.strip()}" if where else ""
            if name == "<<":  # YAML's own: the keys of another mapping
                yield from _unknown(value, kind, where)
            elif name not in _names(kind):
                yield line, f"unknown key {name!r}{of}; {nearest(name, _names(kind))}"
            elif name in seen:
                yield line, f"{name!r}{of} is there twice"
            else:
                yield from _unknown(value, hints[name], f" {name}")
            seen.add(name)


def _names(kind: Any) -> list[str]:
    return [field.name for field in fields(kind)]

"""Names of benchmarks as keys that trackers take."""

from __future__ import annotations

import re
from collections.abc import Mapping

from mui_callback.metrics.catalogue import PREFIX
from mui_callback.metrics.phases import Point

_OTHERS = re.compile(r"[^\w.-]+")
"""What is neither a letter nor a digit, and not among the signs that every tracker takes."""


def clean(name: str) -> str:
    """A name in which only letters, digits, ``_ . -`` are left, in parts that a slash divides.

    What comes in between becomes one underscore, and none is left at the ends of a part; parts without a name are left
    out: ``"exact match (strict)"`` is ``"exact_match_strict"``.

    Raises:
        ValueError: nothing is left.
    """
    parts = [_OTHERS.sub("_", part).strip("_") for part in name.split("/")]
    cleaned = "/".join(part for part in parts if part)
    if not cleaned:
        raise ValueError(f"expected a name with letters or digits, got {name!r}")
    return cleaned


def benchmark_key(name: str) -> str:
    """``mui/benchmark/<name>``."""
    return f"{PREFIX}/benchmark/{name}"


def benchmark_scalars(results: Mapping[str, Point]) -> dict[str, float]:
    """What is logged of results: each value, and its standard error under ``<key>_stderr`` where it is known."""
    scalars: dict[str, float] = {}
    for name, point in results.items():
        scalars[benchmark_key(name)] = point.value
        if point.standard_error is not None:
            scalars[benchmark_key(f"{name}_stderr")] = point.standard_error
    return scalars

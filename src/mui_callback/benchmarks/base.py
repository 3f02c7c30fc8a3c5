"""What a benchmark is, and what it gives: named scores, checked before anybody takes them for numbers."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from numbers import Real
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor, nn

from mui_callback.benchmarks.names import clean
from mui_callback.benchmarks.sharing import Sharing
from mui_callback.metrics.phases import Point, Score

BenchmarkResult = Mapping[str, Point]
"""Scores by name, such as ``"arc_easy/acc"``: each has a `value` and a `standard_error`, which may be None."""

_EXPECTED = "expected a dict of names to numbers, or to pairs of a number and its standard error"


@runtime_checkable
class Benchmark(Protocol):
    """Something that is measured of a model while it trains."""

    @property
    def name(self) -> str:
        """For messages."""

    def run(self, model: nn.Module, step: int, sharing: Sharing) -> BenchmarkResult:
        """Measure a model that is held still.

        In a distributed run all processes make this call; what the main one gives counts.

        Args:
            model: what wrappers hold, in eval mode, without gradients.
            step: optimizer steps done.
            sharing: how the processes share out the work.

        Raises:
            Exception: whatever went wrong; it harms neither other benchmarks nor the training.
        """


def scores_of(returned: object, prefix: str = "") -> dict[str, Score]:
    """What a callable returned, as scores.

    Args:
        returned: a mapping of names to numbers, or to pairs of a number and its standard error. Numbers are those of
            Python and numpy, and tensors without dimensions; a bool is none.
        prefix: put before each name.

    Raises:
        TypeError: it is something else.
        ValueError: it is empty, a number is not finite, a standard error is negative, or two names are the same when
            they are cleaned.
    """
    if not isinstance(returned, Mapping):
        raise TypeError(f"{_EXPECTED}, got {_shown(returned)}")
    if not returned:
        raise ValueError(f"{_EXPECTED}, got an empty one")
    scores: dict[str, Score] = {}
    for name, entry in returned.items():
        if not isinstance(name, str):
            raise TypeError(f"{_EXPECTED}, got the name {_shown(name)}")
        cleaned = clean(f"{prefix}/{clean(name)}")
        if cleaned in scores:
            raise ValueError(f"expected names that differ, got {cleaned!r} twice")
        scores[cleaned] = _score(name, entry)
    for name, score in scores.items():
        if score.standard_error is not None and f"{name}_stderr" in scores:
            raise ValueError(f"expected names that differ, got {name}_stderr next to {name!r} with a standard error")
    return scores


def _score(name: str, entry: object) -> Score:
    if not isinstance(entry, tuple | list):
        return Score(_number(name, entry))
    if len(entry) != 2:
        raise TypeError(f"{name!r}: expected a pair of a number and its standard error, got {_shown(entry)}")
    value, error = entry
    standard_error = None if error is None else _number(f"{name} (standard error)", error)
    if standard_error is not None and standard_error < 0:
        raise ValueError(f"{name!r}: expected a standard error of at least 0, got {standard_error:g}")
    return Score(_number(name, value), standard_error)


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, Real) or isinstance(value, bool | np.bool_):
        raise TypeError(f"{name!r}: expected a number, got {_shown(value)}")
    if not isfinite(value):
        raise ValueError(f"{name!r}: expected a finite number, got {float(value)}")
    return float(value)


def _shown(value: object) -> str:
    return "None" if value is None else f"{type(value).__name__} {value!r:.80}"

"""From what a user gives as `benchmarks` to benchmarks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from mui_callback.benchmarks.base import Benchmark
from mui_callback.benchmarks.callables import BenchmarkFunction, CallableBenchmark
from mui_callback.benchmarks.choices import ChoiceBenchmark
from mui_callback.benchmarks.lm_eval import LMEvalBenchmark
from mui_callback.benchmarks.names import clean
from mui_callback.benchmarks.tasks import LMEval, is_path
from mui_callback.probe.encode import Tokenizer
from mui_callback.probe.probe_set import ProbeSet
from mui_callback.settings import ProbeSettings

OneBenchmark: TypeAlias = BenchmarkFunction | str | os.PathLike[str] | LMEval | Benchmark
Benchmarks: TypeAlias = OneBenchmark | Sequence[OneBenchmark] | Mapping[str, OneBenchmark]
"""A callable, a file of samples with choices, a task of lm-evaluation-harness, or several, with names or without."""

_EXPECTED = (
    "benchmarks: expected a callable (model, step) -> {name: number}, a JSONL file of samples with choices, a task of "
    "lm-evaluation-harness, or a list of these or a mapping of names to them"
)


def check_benchmarks(benchmarks: Benchmarks) -> None:
    """Look at what was given without reading any of it.

    Raises:
        TypeError: something is no benchmark.
        ValueError: a name has no letters, or two are the same.
        ImportError: there are tasks of lm-evaluation-harness, which is not installed.
    """
    _listed(benchmarks)


def as_benchmarks(
    benchmarks: Benchmarks,
    tokenizer: Tokenizer | None = None,
    *,
    max_length: int | None = ProbeSettings.max_length,
    batch_tokens: int = ProbeSettings.batch_tokens,
) -> tuple[Benchmark, ...]:
    """Benchmarks of what was given, read and loaded.

    - A callable is called with the model and the step; in a mapping, its name is put before those of its scores.
    - A path, or a string that ends in ``.jsonl``, is a file of samples with choices. Its name is the stem of the file.
    - Any other string, and a path to a YAML file, is a task of lm-evaluation-harness with the settings of `LMEval`; all
      of them are run in one evaluation. Its name is that of the task.

    Args:
        benchmarks: one of these, an `LMEval` or a `Benchmark`; or a list of them, or a mapping of names to them.
        tokenizer: for samples that are text; lm-evaluation-harness wants one of transformers.
        max_length: tokens that longer samples with choices are cut to; None for the context length of the model.
        batch_tokens: positions in a forward pass over samples with choices.

    Raises:
        TypeError: see `check_benchmarks`, as the two that follow; and a tokenizer is not of the right kind.
        ValueError: a task cannot be loaded.
        ImportError: …
        ProbeSetError: a file cannot be read, a sample has no choices, or is text and there is no tokenizer.
    """
    made: list[Benchmark] = []
    for name, given in _listed(benchmarks):
        if isinstance(given, Benchmark):
            made.append(given)
        elif isinstance(given, LMEval):
            made.append(LMEvalBenchmark(given, tokenizer))
        elif isinstance(given, str | os.PathLike):
            samples = ProbeSet.from_jsonl({"choices": given})
            made.append(ChoiceBenchmark(name, samples, tokenizer, max_length=max_length, batch_tokens=batch_tokens))
        else:
            made.append(CallableBenchmark(given, name))
    return tuple(made)


def _listed(benchmarks: Benchmarks) -> list[tuple[str, OneBenchmark]]:
    """Each with its name, cleaned; the tasks among them make one `LMEval`, the last."""
    listed: list[tuple[str, OneBenchmark]] = []
    tasks: list[str] = []
    named_tasks: dict[str, str] = {}
    names: list[str] = []
    for name, given in _entries(benchmarks):
        label = "" if name is None else clean(name)
        if isinstance(given, str | os.PathLike):
            path = os.fspath(given)
            label = label or clean(Path(path).stem if _is_file(given) else path)
            if not _is_task(given):
                listed.append((label, given))
            elif name is None:
                tasks.append(path)
            else:
                named_tasks[label] = path
        elif isinstance(given, LMEval):
            listed.append(("", given.under(label) if label else given))
        elif isinstance(given, Benchmark) and not isinstance(given, type):
            if label:
                raise TypeError(f"benchmarks: expected a {type(given).__name__} in a list: it names its own scores")
            listed.append(("", given))
        elif callable(given) and not isinstance(given, type):
            listed.append((label, given))
        else:
            raise TypeError(f"{_EXPECTED}, got {type(given).__name__} {given!r:.80}")
        if label and label in names:
            raise ValueError(f"benchmarks: expected names that differ, got {label!r} twice; a mapping gives them names")
        names.append(label)
    listed += [("", LMEval(some)) for some in (tasks, named_tasks) if some]
    return listed


def _entries(benchmarks: object) -> Iterator[tuple[str | None, object]]:
    if isinstance(benchmarks, Mapping):
        for name, given in benchmarks.items():
            if not isinstance(name, str):
                raise TypeError(f"{_EXPECTED}, got the name {name!r:.80}")
            yield name, given
    elif isinstance(benchmarks, list | tuple):
        for given in benchmarks:
            yield from _entries(given)
    else:
        yield None, benchmarks


def _is_task(given: str | os.PathLike[str]) -> bool:
    return is_path(os.fspath(given)) or not _is_file(given)


def _is_file(given: str | os.PathLike[str]) -> bool:
    return not isinstance(given, str) or Path(given).suffix == ".jsonl" or is_path(given)

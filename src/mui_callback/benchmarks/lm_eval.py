"""Tasks of lm-evaluation-harness as a benchmark of the live model."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mui_callback.benchmarks.base import BenchmarkResult
from mui_callback.benchmarks.names import clean
from mui_callback.benchmarks.quiet import harness_held_still
from mui_callback.benchmarks.sharing import Sharing
from mui_callback.benchmarks.tasks import LMEval, is_path, load_tasks
from mui_callback.errors import UnsupportedModelError
from mui_callback.forgiving import warn
from mui_callback.metrics.phases import Point, Score
from mui_callback.metrics.resampling import ratio_of_sums
from mui_callback.probe.freeze import random_state_kept

_SEED = 1234
"""Of few-shot examples, and of everything that a task draws; the harness has the same one."""


class LMEvalBenchmark:
    """Runs all tasks of one `LMEval` on the live model, in one evaluation.

    Tasks and their data are loaded once, at the beginning. The scores are ``<task>/<metric>``, such as
    ``arc_easy/acc``, and ``<task>/<metric>_<filter>`` where the harness has filtered the answers. Means over samples
    come with what each sample adds to them; other metrics have no standard error. A group that has
    a score of its own stands for its tasks; one without, and a tag, are their tasks. A score that is not finite, as a
    perplexity can be before training, is left out with a warning.

    The model is one of transformers. The harness sees a stand-in of it and a copy of the tokenizer: nothing is moved,
    wrapped, tied or switched, no seed and no progress bar is left behind.

    In a distributed run each process runs the requests of its share of the contexts, if it has the whole model to
    itself (DDP, ZeRO 1 and 2). With weights or experts spread over processes (FSDP2, ZeRO 3, expert parallelism) each
    of them runs all requests, as every forward needs all processes: no faster than one alone. There, tasks that
    generate text gather the weights once for every token; with ZeRO 3 and FSDP2 it works, and is slow.

    Args:
        options: the tasks.
        tokenizer: one of transformers.

    Raises:
        TypeError: it is no tokenizer of transformers.
        ValueError: a task is not known or cannot be loaded.
    """

    def __init__(self, options: LMEval, tokenizer: Any) -> None:
        self.options = options
        self.tokenizer = _checked(tokenizer)
        with random_state_kept(), harness_held_still():
            self._tasks = load_tasks(options)

    @property
    def name(self) -> str:
        """Its tasks."""
        names = [name or (Path(task).stem if is_path(task) else task) for name, task in self.options.named]
        return f"lm-eval ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"

    def run(self, model: nn.Module, step: int, sharing: Sharing) -> BenchmarkResult:
        """One evaluation.

        Raises:
            UnsupportedModelError: the model is none of transformers, or its weights are on several devices.
            Exception: whatever the harness raises.
        """
        if not (hasattr(model, "config") and hasattr(model, "generate")):
            raise UnsupportedModelError(
                f"lm-eval needs a model of transformers, with a config and generate(), got {type(model).__name__}"
            )
        with random_state_kept(), harness_held_still():
            from lm_eval.evaluator import evaluate

            from mui_callback.benchmarks.live_lm import LiveLM

            random.seed(_SEED)
            np.random.seed(_SEED)  # noqa: NPY002 - the global one is what tasks draw from
            torch.manual_seed(_SEED)
            for task in self._tasks.harness["tasks"].values():
                task.set_fewshot_seed(seed=_SEED)
            lm = LiveLM(model, self.tokenizer, sharing, self.options.batch_size)
            found = evaluate(lm, self._tasks.harness, limit=self.options.limit)
            means = {name: _means(task) for name, task in self._tasks.harness["tasks"].items()}
        return dict(self._points(found["results"], found["samples"], means))

    def _points(
        self,
        found: Mapping[str, Mapping[str, Any]],
        samples: Mapping[str, Sequence[Mapping[str, Any]]],
        means: Mapping[str, frozenset[str]],
    ) -> Iterator[tuple[str, Point]]:
        def points(label: str, task: str) -> list[tuple[str, Point]]:
            return list(_points(label, found.get(task, {}), samples.get(task, ()), means.get(task, frozenset())))

        for label, whole, parts in self._tasks.asked:
            own = points(label or whole, whole)
            yield from own
            for part in () if own else parts:
                yield from points(f"{label}/{part}" if label else part, part)


def _means(task: Any) -> frozenset[str]:
    """The metrics of a task that are the mean of what its samples have."""
    from lm_eval.api.metrics import mean

    return frozenset(metric for metric, aggregate in task.aggregation().items() if aggregate is mean)


def _points(
    name: str, found: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], means: frozenset[str]
) -> Iterator[tuple[str, Point]]:
    """The scores of one task, whose metrics the harness names ``acc,none`` and ``acc_stderr,none``."""
    for key, value in found.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
            continue
        label = clean(f"{name}/{metric}" if filtered == "none" else f"{name}/{metric}_{filtered}")
        if not isfinite(value):
            warn(f"MUI: {label} is {value} and is left out")
            continue
        error = found.get(f"{metric}_stderr,{filtered}")
        score = Score(float(value), float(error) if isinstance(error, Real) and isfinite(error) else None)
        if metric not in means:
            yield label, score
            continue
        value_N = [float(sample[metric]) for sample in samples if sample["filter"] == filtered and metric in sample]
        yield label, ratio_of_sums(np.array(value_N), np.ones(len(value_N))) or score


def _checked(tokenizer: Any) -> Any:
    if not (hasattr(tokenizer, "encode") and hasattr(tokenizer, "decode") and hasattr(tokenizer, "eos_token_id")):
        came = "none" if tokenizer is None else type(tokenizer).__name__
        raise TypeError(f"lm-eval: expected a tokenizer of transformers (tokenizer=), got {came}")
    return tokenizer

"""The evaluation harness held still: it prints nothing, and leaves loggers, bars and the environment as they were.

Importing this module imports nothing optional; entering the context does.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

_LOGGERS = ("lm_eval", "datasets", "transformers", "huggingface_hub")


@contextmanager
def harness_held_still() -> Iterator[None]:
    """For everything that is done with lm-evaluation-harness, importing it included.

    Standard errors inside are those with a closed formula (of means, that is): for others it would fork the training
    process as often as the machine has cores, for 100 000 resamples of each metric.
    """
    with ExitStack() as stack:
        stack.callback(partial(_restore_environment, dict(os.environ)))
        for name in _LOGGERS:
            logger = logging.getLogger(name)
            stack.callback(partial(logger.setLevel, logger.level))
            logger.setLevel(logging.ERROR)

        import datasets.utils
        import huggingface_hub.utils
        import lm_eval.api.metrics as metrics
        import lm_eval.api.task
        import lm_eval.evaluator_utils

        for library in (datasets.utils, huggingface_hub.utils):
            if not library.are_progress_bars_disabled():
                stack.callback(library.enable_progress_bars)
                library.disable_progress_bars()
        closed = {metrics.mean: metrics.mean_stderr, metrics.acc_all: metrics.acc_all_stderr}
        _replace(stack, lm_eval.evaluator_utils, "stderr_for_metric", lambda metric, **_: closed.get(metric))
        _replace(stack, lm_eval.api.task, "tqdm", _without_bar(lm_eval.api.task.tqdm))
        yield


def _without_bar(tqdm: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **options: tqdm(*args, **{**options, "disable": True})


def _replace(stack: ExitStack, module: Any, name: str, replacement: Any) -> None:
    stack.callback(partial(setattr, module, name, getattr(module, name)))
    setattr(module, name, replacement)


def _restore_environment(before: dict[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})

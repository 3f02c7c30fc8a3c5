"""Probing again and again, with a pass in between that fails; alone, and as what each of several processes does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backend_training import SETTINGS, many
from backends import BACKENDS
from mui_callback import MUIProbe, MUIReport
from mui_callback.errors import ProbeError
from mui_callback.scoring.batch_counts import BatchCounts
from tiny import VOCAB


@dataclass
class Passes:
    """What came of one probe that was made several times."""

    first: MUIReport
    second: MUIReport
    """Of the same weights."""
    error: str
    """What the pass after that failed with."""
    third: MUIReport
    """Of the same weights."""
    fourth: MUIReport
    """After a training step."""
    fresh: MUIReport
    """Of another probe, at these weights."""


def measure_again_and_again(
    model: nn.Module, train_step: Callable[[Tensor], Any], *, fails: bool, layer: int = -1
) -> Passes:
    """Measure twice, fail, measure, train, measure, and measure with another probe.

    Args:
        model: what is probed.
        train_step: changes its weights.
        fails: whether it is this process in which a pass fails.
        layer: position of the layer whose scores cannot be counted then.
    """
    probe = MUIProbe(model, many(), **SETTINGS)
    first, second = probe.measure(), probe.measure()
    with (
        _failing(layer % len(probe.layers) if fails else None),
        pytest.raises((ArithmeticError, ProbeError)) as failure,
    ):
        probe.measure()
    third = probe.measure()
    train_step(torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0)))
    fourth, fresh = probe.measure(), MUIProbe(model, many(), **SETTINGS).measure()
    return Passes(first, second, f"{type(failure.value).__name__}: {failure.value}", third, fourth, fresh)


def in_processes(rank: int, directory: Path, *, name: str, fails_in: int) -> Passes:
    """The same with a model that is spread over processes, where a pass fails in one of them."""
    trainee = BACKENDS[name].build()
    return measure_again_and_again(trainee.model, trainee.train_step, fails=rank == fails_in)


@contextmanager
def _failing(layer: int | None) -> Iterator[None]:
    add_layer = BatchCounts.add_layer

    def fail(counts: BatchCounts, number: int, *args: Any) -> None:
        if number == layer:
            raise ArithmeticError("injected")
        add_layer(counts, number, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchCounts, "add_layer", fail)
        yield

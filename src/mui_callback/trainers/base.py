"""What the core needs to know of a trainer, and what it wants to be told."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mui_callback.probe.probe_set import ProbeSet
from mui_callback.sinks.base import Sink


@dataclass(frozen=True)
class Training:
    """A training that begins, or goes on."""

    model: nn.Module
    """What is trained: a language model, or a module that holds one."""
    step: int
    """Optimizer steps done."""
    output_dir: Path
    """Where its files go."""
    trackers: Sequence[Sink]
    """Where its metrics go."""
    tokenizer: Any
    """That of the data; None if the trainer does not know it."""
    eval_data: Callable[[int], ProbeSet | None]
    """At most so many samples of each of the trainer's own eval data sets, each a task; None if it has none."""
    state: Mapping[str, Any] | None = None
    """What a checkpoint holds of the run that goes on."""


class TrainingEvents(ABC):
    """Told by the events of a trainer, in this order; all but the first do nothing between two trainings."""

    @abstractmethod
    def _begin(self, training: Training) -> None:
        """Before the first optimizer step."""

    @abstractmethod
    def _step(self, step: int, *, evaluated: bool = False, last: bool = False) -> None:
        """After each optimizer step; again if the trainer has evaluated, or finds that this step was the last."""

    @abstractmethod
    def _end(self) -> None:
        """After training, whatever ended it."""

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """What a checkpoint has to hold."""

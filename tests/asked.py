"""What is asked for besides a probe in the tests, and a plain loop that asks for it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from integrations import make_model, probe_set
from mui_callback import MemorySink, MUIMonitor
from training import rows

EVERYTHING: dict[str, Any] = {"phase_window": 3, "phase_level": 0.01, "ablate": True}
"""Besides benchmarks; at such a level whatever changes at all has a direction."""
NOT_OF_THE_MODEL = ("mui/seconds", "mui/overhead", "mui/comm_bytes")


def loss_of_four(model: nn.Module, step: int) -> dict[str, tuple[float, float]]:
    """Depends on the weights; draws random numbers, and would count load if anybody did."""
    torch.rand(3)
    ids = torch.stack([row["input_ids"] for row in rows(4, seed=5)])
    logits_NTV = model(input_ids=ids).logits[:, :-1].double()  # some trainers put a loss of their own into a model
    loss_N = cross_entropy(logits_NTV.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
    return {"loss": (loss_N.mean().item(), loss_N.std().item() / 2)}


def steps_done(model: nn.Module, step: int) -> dict[str, float]:
    """Rises for sure."""
    return {"a": step}


def merged(memory: MemorySink) -> dict[int, dict[str, float]]:
    """What is logged at each step, whether in one row or in two, without what is not of the model."""
    found: dict[int, dict[str, float]] = {}
    for point in memory.points:
        found.setdefault(point.step, {}).update(point.scalars)
    return {
        step: {name: value for name, value in scalars.items() if name not in NOT_OF_THE_MODEL}
        for step, scalars in found.items()
    }


def phases(memory: MemorySink) -> dict[tuple[int, str | None], dict[str, Any]]:
    """All calls, by step and task, as the record has them."""
    return {(point.step, task): phase.to_dict() for point in memory.points for task, phase in point.phases.items()}


class Loop:
    """A training of a tiny model, step by step, under the eyes of a monitor."""

    def __init__(self, directory: Path, *, model: nn.Module | None = None, **options: Any) -> None:
        self.model = (model or make_model()).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.memory = MemorySink()
        defaults = {
            "every": 2,
            "rules": "top_fraction=0.05",
            "sinks": [self.memory],
            "output_dir": directory,
            "tracker": None,
        }
        self.monitor = MUIMonitor(self.model, options.pop("probe_set", probe_set()), **{**defaults, **options})

    def train(self, steps: Iterable[int]) -> Loop:
        """Through these steps; each has its own data and random numbers, so that a training can go on with any."""
        for step in steps:
            torch.manual_seed(step)
            ids = torch.stack([row["input_ids"] for row in rows(4, seed=step)])
            self.model(input_ids=ids, labels=ids).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.monitor.step(step)
        return self

    @property
    def steps(self) -> list[int]:
        """Of the points."""
        return [point.step for point in self.memory.points]

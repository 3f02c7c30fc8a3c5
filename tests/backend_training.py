"""What each process of a distributed training does in the tests of the backends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils.hooks import RemovableHandle

from backends import BACKENDS, Backend, Trainee
from distributed_training import noted, output_dir
from mui_callback import MemorySink, MUIMonitor, MUIProbe, MUIReport, ProbeSet
from mui_callback.probe.samples import TokenChoice, TokenSample
from mui_callback.scoring.batch_counts import BatchCounts
from mui_callback.sinks.base import ProbePoint
from tiny import VOCAB
from tiny_samples import make_samples

N_STEPS = 3
RULES = ("top_fraction=0.02", "top_fraction=0.1", "topscore=0.5", "topscore=1", "global_topk=7")
SETTINGS: dict[str, Any] = {"batch_tokens": 40, "rules": RULES}


def many() -> ProbeSet:
    """Nine samples, so that processes get batches of different sizes and not the same number of them."""
    with_choices = [
        TokenSample(s.id, s.input_ids, s.scored, choices=_choices(number), answer=number % 3)
        for number, s in enumerate(make_samples(3, (5, 6, 13, 8, 21)))
    ]
    return ProbeSet({"a": make_samples(7), "b": with_choices})


def _choices(number: int) -> tuple[TokenChoice, ...]:
    return tuple(TokenChoice(s.input_ids, s.scored) for s in make_samples(number, (6, 9, 4)))


def one() -> ProbeSet:
    """Fewer samples than processes."""
    return ProbeSet({"a": make_samples(7)[:1]})


PROBE_SETS = {"many": many, "one": one}


def measured(model: nn.Module) -> dict[str, MUIReport]:
    """A report of each probe set."""
    return {name: MUIProbe(model, make(), **SETTINGS).measure() for name, make in PROBE_SETS.items()}


def probe(rank: int, directory: Path, *, name: str) -> dict[str, MUIReport]:
    """Measure a model that is spread over processes."""
    return measured(BACKENDS[name].build().model)


@dataclass
class Trained:
    """What a process has after some steps."""

    losses: list[float] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    """What this process has of them."""
    random: Tensor | None = None
    modes: list[bool] = field(default_factory=list)
    """Whether each module is in training mode."""
    points: list[ProbePoint] = field(default_factory=list)
    error: str | None = None
    """What ended it."""
    warnings: list[str] = field(default_factory=list)


def train(
    rank: int,
    directory: Path,
    *,
    name: str,
    is_monitored: bool = True,
    fails_reading: tuple[int, int] | None = None,
    fails_forward: tuple[int, int] | None = None,
) -> Trained:
    """Train for some steps.

    Args:
        rank: this process.
        directory: of the launch.
        name: of the backend.
        is_monitored: whether each step is probed.
        fails_reading: a process and a step whose probe cannot count what it has read.
        fails_forward: a process and a step in whose probe the model itself fails.
    """
    backend = BACKENDS[name]
    trainee = backend.build()
    seen = Trained()
    torch.manual_seed(rank)
    with noted(seen):
        monitor = _monitor(trainee, rank, directory, seen) if is_monitored else None
        for step in range(1, N_STEPS + 1):
            seen.losses.append(trainee.train_step(_tokens(backend, step, rank)))
            if monitor is not None:
                with _sabotaged(trainee.model, fails_reading == (rank, step), fails_forward == (rank, step)):
                    monitor.step(step)
        if monitor is not None:
            monitor.close()
    seen.weights = [_local(weight) for weight in trainee.model.parameters()]
    seen.random = torch.get_rng_state()
    seen.modes = [module.training for module in trainee.model.modules()]
    return seen


def _tokens(backend: Backend, step: int, rank: int) -> Tensor:
    seed = step if backend.is_same_batch else 100 * step + rank
    return torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(seed))


def _monitor(trainee: Trainee, rank: int, directory: Path, seen: Trained) -> MUIMonitor:
    sink = MemorySink()
    seen.points = sink.points
    return MUIMonitor(trainee.model, many(), every=1, sinks=[sink], output_dir=output_dir(directory, rank), **SETTINGS)


def _local(weight: Any) -> Tensor:
    if hasattr(weight, "ds_tensor"):
        return weight.ds_tensor.detach().clone()
    return (weight.to_local() if hasattr(weight, "to_local") else weight).detach().clone()


@contextmanager
def _sabotaged(model: nn.Module, in_reading: bool, in_forward: bool) -> Iterator[None]:
    add_layer = BatchCounts.add_layer
    handles: list[RemovableHandle] = []
    if in_reading:
        BatchCounts.add_layer = _fail
    if in_forward:
        handles.append(list(model.modules())[-1].register_forward_pre_hook(_fail))
    try:
        yield
    finally:
        BatchCounts.add_layer = add_layer
        for handle in handles:
            handle.remove()


def _fail(*args: Any) -> None:
    raise RuntimeError(f"injected in process {distributed.get_rank()}")


def probe_after(rank: int, directory: Path, *, name: str, before: str) -> dict[str, Any]:
    """Probe twice where weights are whole in part, and look at what is left.

    Args:
        rank: this process.
        directory: of the launch.
        name: of the backend.
        before: ``"evaluated"``, ``"unsharded"`` by hand, or ``"nothing"``.
    """
    trainee = BACKENDS[name].build()
    model: Any = trainee.model
    trainee.train_step(torch.arange(3, 27).view(2, 12))
    if before == "evaluated":
        model.eval()
        with torch.no_grad():
            model(torch.arange(3, 27).view(2, 12))
        model.train()
    elif before == "unsharded":
        model.unshard()
    kinds = {path: type(weight) for path, weight in model.named_parameters()}
    probe = MUIProbe(model, many(), **SETTINGS)
    reports = [probe.measure(), probe.measure()]
    return {
        "losses": [report.pooled.loss for report in reports],
        "is as before": kinds == {path: type(weight) for path, weight in model.named_parameters()},
        "sizes": {path: _size(weight) for path, weight in model.state_dict().items()},
        "next loss": trainee.train_step(torch.arange(3, 27).view(2, 12)),
    }


def _size(weight: Any) -> int:
    """Elements that are there to be saved."""
    whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return whole.untyped_storage().nbytes() // whole.element_size()

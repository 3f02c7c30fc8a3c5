"""Whether the processes of a run have what they must have in common before they share out a probe."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mui_callback.errors import ProbeSetError, UnsupportedModelError
from mui_callback.forgiving import warn
from mui_callback.parallel.processes import Processes
from mui_callback.parallel.shards import Shards
from mui_callback.parallel.weights import is_dtensor, is_zero3

_LOOKED_AT = 8
"""Elements of each weight that are compared."""


def agreed(
    processes: Processes, shards: Shards, model: nn.Module, apart: Iterable[nn.Module], described: Mapping[str, Any]
) -> Shards:
    """How the samples are dealt out after all: to nobody but oneself where each process trains a model of its own.

    Args:
        processes: all of them.
        shards: how they would be.
        model: the model of this process.
        apart: modules whose weights differ from process to process.
        described: what is the same in all processes that train one model together, as JSON.

    Raises:
        UnsupportedModelError: the models have different layers.
        ProbeSetError: the probe sets are different.
    """
    if shards.world.is_alone:
        return shards
    mine = {name: json.dumps(value, sort_keys=True) for name, value in described.items()}
    of_main: Mapping[str, str] = processes.from_main(lambda: mine)
    different = [name for name, value in mine.items() if of_main[name] != value]
    processes.raise_everywhere(_error(shards, different[0]) if different else None)
    weights = _digest(model, apart)
    of_main = processes.from_main(lambda: {"weights": weights})
    others = processes.gather_failures(None if of_main["weights"] == weights else ValueError("other weights"))
    if not others:
        return shards
    if shards.in_step:
        raise UnsupportedModelError(
            "expected weights that are not spread over processes to be the same in all of them, but they differ"
        )
    if processes.is_main:
        warn("MUI: the processes train models of their own; each probes its own, and that of process 0 is logged.")
    return Shards()


def _error(shards: Shards, different: str) -> Exception:
    if different == "layers":
        return UnsupportedModelError(
            f"process {shards.rank} has other layers than process 0. Where the layers of a model are spread over "
            "processes (pipeline parallelism), it cannot be probed."
        )
    return ProbeSetError(
        f"expected one {different} in all processes, got another one in process {shards.rank} than in process 0. Pass "
        "the same samples to all of them."
    )


def _digest(model: nn.Module, apart: Iterable[nn.Module]) -> str:
    """Equal for equal weights, as far as they are the same in all processes; looks at a few elements of each."""
    elsewhere = {id(weight) for module in apart for weight in module.parameters()}
    parts: list[Tensor] = [
        weight.detach().flatten()[:_LOOKED_AT].double()
        for weight in model.parameters()
        if id(weight) not in elsewhere and not is_dtensor(weight) and not is_zero3(weight)
    ]
    if not parts:
        return ""
    return hashlib.sha256(torch.cat(parts).cpu().numpy().tobytes()).hexdigest()

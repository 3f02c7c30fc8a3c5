"""Whether the processes of a run have what they must have in common before they share out a probe."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mui_callback.errors import ProbeSetError, UnsupportedModelError
from mui_callback.parallel.processes import Processes
from mui_callback.parallel.weights import is_divided, is_dtensor

_LOOKED_AT = 16
"""Elements of each weight that are compared."""


def check_same(processes: Processes, rank: int, described: Mapping[str, Any]) -> None:
    """Make sure that all processes would probe the same.

    Args:
        processes: all of them.
        rank: that of this one.
        described: what has to be the same, as JSON.

    Raises:
        UnsupportedModelError: the models have different layers.
        ProbeSetError: the probe sets are different.
    """
    mine = {name: json.dumps(value, sort_keys=True) for name, value in described.items()}
    of_main: Mapping[str, str] = processes.from_main(lambda: mine)
    different = [name for name, value in mine.items() if of_main[name] != value]
    processes.raise_everywhere(_error(rank, different[0]) if different else None)


def have_one_model(processes: Processes, model: nn.Module, apart: Iterable[nn.Module]) -> bool:
    """Whether the weights that all processes should have in common are the same; to be asked again as they train on.

    Args:
        processes: all of them.
        model: the model of this process.
        apart: modules whose weights differ from process to process.
    """
    mine = _digest(model, apart)
    of_main: str = processes.from_main(lambda: mine)
    return not processes.gather_failures(None if of_main == mine else ValueError("other weights"))


def _error(rank: int, different: str) -> Exception:
    if different == "layers":
        return UnsupportedModelError(
            f"process {rank} has other layers than process 0. Where the layers of a model are spread over "
            "processes (pipeline parallelism), it cannot be probed."
        )
    return ProbeSetError(
        f"expected one {different} in all processes, got another one in process {rank} than in process 0. Pass "
        "the same samples to all of them."
    )


def _digest(model: nn.Module, apart: Iterable[nn.Module]) -> str:
    """Equal for equal weights, as far as they are the same in all processes; looks at a few elements of each."""
    elsewhere = {id(weight) for module in apart for weight in module.parameters()}
    parts: list[Tensor] = [
        _local(weight).flatten()[:: max(1, weight.numel() // _LOOKED_AT)].double()
        for weight in model.parameters()
        if id(weight) not in elsewhere and not is_divided(weight)
    ]
    if not parts:
        return ""
    return hashlib.sha256(torch.cat(parts).cpu().numpy().tobytes()).hexdigest()


def _local(weight: Any) -> Tensor:
    local: Tensor = weight.to_local() if is_dtensor(weight) else weight
    return local.detach()

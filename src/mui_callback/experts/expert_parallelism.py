"""Routed experts that are spread over processes: each has some of them, and tokens travel to whoever has theirs.

How they travel is left to the backend (but see `experts.dispatch`). What follows the experts carries their outputs
back, collectives included, and as it can be trained through, it can be transposed (see `experts.tail`): so the readout
of a token reaches the process that has its expert, and with it the token's number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mui_callback.errors import UnsupportedModelError
from mui_callback.experts.dispatch import Dispatch, find_dispatch
from mui_callback.experts.paths import is_numbered, outside
from mui_callback.parallel.peers import Peers
from mui_callback.parallel.weights import is_dtensor


@dataclass(frozen=True)
class Spread:
    """Which experts of a layer are in this process: an equal stretch in each, in the order of the processes."""

    peers: Peers = field(default_factory=Peers)
    """The processes that have the experts of the layer, each once; this one alone if it has them all."""
    dispatch: Dispatch | None = None
    """How tokens travel to them, where that is known."""

    def first(self, n_local: int) -> int:
        """Number of the first expert of this process, which has `n_local`."""
        return self.peers.index * n_local

    def total(self, n_local: int) -> int:
        """Experts of all processes."""
        return self.peers.n * n_local


NOT_SPREAD = Spread()
_TENSOR_PARALLEL = frozenset({"tp", "tensor_parallel"})
"""What transformers and Lightning name the dimension of a device mesh in which matrices are divided."""


def find_spread(modules: Mapping[str, nn.Module], path: str) -> Spread:
    """How the routed experts at a path are spread over processes.

    Raises:
        UnsupportedModelError: they are, in a way that is not known.
    """
    if getattr(modules[path], "_is_expert_parallel", False):
        return Spread(Peers(_group_of_transformers(path, modules[path])))
    while path and not is_numbered(path):
        # DeepSpeed's MOELayer and AutoEPMoELayer
        module: Any = modules[path]
        if hasattr(module, "num_local_experts") and hasattr(module, "ep_group") and module.ep_size > 1:
            if module.ep_group is None:
                raise UnsupportedModelError(
                    f"{path}: its experts are to be spread over {module.ep_size} processes, which do not know each "
                    "other yet. Is the model used before deepspeed.initialize?"
                )
            return Spread(Peers(module.ep_group), find_dispatch(module))
        path = outside(path)
    return NOT_SPREAD


def refuse_parts_of_experts(path: str, module: nn.Module) -> None:
    """Raises `UnsupportedModelError` if each process has a part of every expert of a module (tensor parallelism)."""
    if getattr(module, "_is_expert_parallel", False):
        return
    for name, weight in module.named_parameters():
        if is_dtensor(weight) and not _TENSOR_PARALLEL.isdisjoint(weight.device_mesh.mesh_dim_names or ()):  # type: ignore[attr-defined]
            raise UnsupportedModelError(
                f"{path}.{name}: each process has a part of every expert (tensor parallelism), so that no process sees "
                "whole neurons' contributions. Spread whole experts over processes instead (expert parallelism)."
            )


def _group_of_transformers(path: str, module: nn.Module) -> Any:
    weight: Any = next(weight for weight in module.parameters() if is_dtensor(weight))
    mesh = weight.device_mesh
    names = mesh.mesh_dim_names or ()
    if mesh.ndim == 1:
        return mesh.get_group()
    if "ep" in names:
        return mesh["ep"].get_group()
    raise UnsupportedModelError(
        f"{path}: expected experts on a device mesh with a dimension named ep, got {names or mesh.ndim}"
    )

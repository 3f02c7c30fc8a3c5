"""Ways to divide a model among processes in which a probe would measure something else, or nothing."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from mui_callback.errors import UnsupportedModelError
from mui_callback.parallel.peers import Peers
from mui_callback.parallel.weights import fsdp_weights, is_dtensor, spread_over


def refuse_what_cannot_be_probed(model: nn.Module, world: Peers) -> None:
    """Raise for pipeline stages, sequence parallelism, tensor parallelism and several models in one run.

    Args:
        model: the model of this process.
        world: all processes.

    Raises:
        UnsupportedModelError: it is one of these; the message says which, and where.
    """
    _refuse_pipelines(model)
    _refuse_sequence_parallelism()
    if size_in_mesh(model, "tp") == 1:  # transformers keeps its batches together where it divides matrices
        _refuse_tensor_parallelism(model)
    _refuse_other_worlds(model, world)


def size_in_mesh(model: nn.Module, dimension: str) -> int:
    """Processes in a dimension of the device mesh that transformers spreads a model over; 1 without such a mesh."""
    mesh: Any = getattr(model, "_device_mesh", None)
    return int(mesh[dimension].size()) if dimension in (getattr(mesh, "mesh_dim_names", None) or ()) else 1


def _refuse_pipelines(model: nn.Module) -> None:
    if size_in_mesh(model, "pp") > 1 or any(cls.__name__ == "PipelineModule" for cls in type(model).__mro__):
        raise UnsupportedModelError(
            f"{type(model).__name__}: its layers are spread over processes (pipeline parallelism), so that no process "
            "can run it as a whole. Pipeline stages cannot be probed."
        )


def _refuse_sequence_parallelism() -> None:
    state: Any = sys.modules.get("deepspeed.runtime.sequence_parallel.parallel_state_sp")
    if getattr(state, "_SEQUENCE_PARALLEL_GROUP", None) is not None and state.get_sequence_parallel_world_size() > 1:
        raise UnsupportedModelError(
            "processes have parts of the same sequences (DeepSpeed's sequence parallelism), so that none of them can "
            "run a sample as a whole. That cannot be probed."
        )


def _refuse_other_worlds(model: nn.Module, world: Peers) -> None:
    """Weights that are spread are spread over all processes, if these train one model."""
    ranks = spread_over(model)
    if ranks and len(ranks) < world.n:
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected a model that all {world.n} processes train together, got one whose "
            f"weights are spread over {len(ranks)} of them ({', '.join(map(str, sorted(ranks)))}). Several models in "
            "one run cannot be probed."
        )


def _refuse_tensor_parallelism(model: nn.Module) -> None:
    """Without FSDP, a weight that is a DTensor is a part of a matrix that several processes multiply with."""
    for path, module in model.named_modules():
        if getattr(module, "is_tp_parallel", False):  # as DeepSpeed's layers say it
            raise _tensor_parallel(path, type(module).__name__)
    of_fsdp = set(fsdp_weights(model))
    for path, module in model.named_modules():
        if getattr(module, "_is_expert_parallel", False):
            continue
        for name, weight in module.named_parameters(recurse=False):
            # FSDP divides a weight in one dimension of its mesh, and may copy it in another.
            n_divisions = sum(not placement.is_replicate() for placement in getattr(weight, "placements", ()))
            if is_dtensor(weight) and n_divisions > ((module, name) in of_fsdp):
                raise _tensor_parallel(f"{path}.{name}", "DTensor")


def _tensor_parallel(path: str, kind: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{path}: expected a weight that is whole in this process, or of ZeRO or FSDP2, got a part of one ({kind}). "
        "Tensor parallelism can be probed only where transformers does it (DistributedConfig), beside its expert "
        "parallelism."
    )

"""Which process of a run probes which part of the samples."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from torch import distributed, nn

from mui_callback.errors import UnsupportedModelError
from mui_callback.parallel.peers import Peers, Traffic
from mui_callback.parallel.weights import fsdp_weights, is_dtensor, is_spread, spread_over


@dataclass(frozen=True)
class Shards:
    """The samples are dealt out to shards, and each process has one of these.

    Processes that need the same batch in a forward (a tensor-parallel group) have the same shard; the first of them
    counts what all of them see.
    """

    shard_of: tuple[int, ...] = (0,)
    """By rank in the world, the shard of each process."""
    rank: int = 0
    in_step: bool = False
    """Whether processes exchange tensors inside of a forward, so that all have to make the same number of them."""
    traffic: Traffic = field(default_factory=Traffic)
    world: Peers = field(default_factory=Peers)
    """All processes among which the samples are dealt out."""

    @property
    def own(self) -> int:
        """The shard of this process."""
        return self.shard_of[self.rank]

    @property
    def n(self) -> int:
        """Number of shards."""
        return max(self.shard_of) + 1

    @property
    def counts(self) -> bool:
        """Whether this process counts what all of its shard see."""
        return self.shard_of.index(self.own) == self.rank

    @classmethod
    def of(cls, model: nn.Module, *, exchanges_tokens: bool) -> Shards:
        """Of a model as it is trained by the processes of `torch.distributed`.

        Args:
            model: the model.
            exchanges_tokens: whether its experts are spread over processes.

        Raises:
            UnsupportedModelError: its layers are spread over processes (pipeline stages), or its matrices are in a way
                that is not known.
        """
        traffic = Traffic()
        if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
            return cls(traffic=traffic)
        _refuse_pipelines(model)
        _refuse_sequence_parallelism()
        world = Peers(distributed.group.WORLD, traffic)
        shard_of = _by_batch(model, world)
        _refuse_other_worlds(model, world)
        in_step = exchanges_tokens or is_spread(model) or max(shard_of) + 1 < world.n
        return cls(shard_of, world.index, in_step, traffic, world)


def _by_batch(model: nn.Module, world: Peers) -> tuple[int, ...]:
    """The shard of each process, by the dimension of transformers' device mesh in which batches are the same."""
    mesh: Any = getattr(model, "_device_mesh", None)
    names = getattr(mesh, "mesh_dim_names", None) or ()
    if "tp" not in names or mesh["tp"].size() == 1:
        _refuse_tensor_parallelism(model)
        return tuple(range(world.n))
    groups = mesh.mesh.movedim(names.index("tp"), -1).reshape(-1, mesh["tp"].size()).tolist()
    shard = {rank: index for index, ranks in enumerate(groups) for rank in ranks}
    return tuple(shard[rank] for rank in range(world.n))


def _refuse_pipelines(model: nn.Module) -> None:
    mesh: Any = getattr(model, "_device_mesh", None)
    names = getattr(mesh, "mesh_dim_names", None) or ()
    stages = "pp" in names and mesh["pp"].size() > 1
    if stages or any(cls.__name__ == "PipelineModule" for cls in type(model).__mro__):
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

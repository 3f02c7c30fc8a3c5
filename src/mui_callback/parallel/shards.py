"""Which process of a run probes which part of the samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import distributed, nn

from mui_callback.parallel.peers import Peers, Traffic
from mui_callback.parallel.refused import refuse_what_cannot_be_probed, size_in_mesh
from mui_callback.parallel.weights import is_spread


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
            UnsupportedModelError: see `refuse_what_cannot_be_probed`.
        """
        traffic = Traffic()
        if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
            return cls(traffic=traffic)
        world = Peers(distributed.group.WORLD, traffic)
        refuse_what_cannot_be_probed(model, world)
        shard_of = _by_batch(model, world)
        in_step = exchanges_tokens or is_spread(model) or max(shard_of) + 1 < world.n
        return cls(shard_of, world.index, in_step, traffic, world)


def _by_batch(model: nn.Module, world: Peers) -> tuple[int, ...]:
    """The shard of each process, by the dimension of transformers' device mesh in which batches are the same."""
    size = size_in_mesh(model, "tp")
    if size == 1:
        return tuple(range(world.n))
    mesh: Any = model._device_mesh
    groups = mesh.mesh.movedim(mesh.mesh_dim_names.index("tp"), -1).reshape(-1, size).tolist()
    shard = {rank: index for index, ranks in enumerate(groups) for rank in ranks}
    return tuple(shard[rank] for rank in range(world.n))

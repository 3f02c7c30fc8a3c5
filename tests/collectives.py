"""What each process does in the tests of what processes send each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed

from mui_callback.parallel.peers import Peers, Traffic
from mui_callback.parallel.processes import Processes
from mui_callback.parallel.rows import rows_of
from mui_callback.scoring.contributions import Responses
from mui_callback.scoring.meeting import Meeting
from mui_callback.scoring.topk import Candidates, merge_candidates


def collect(rank: int, directory: Path, *, lists: list[list[int]], sums: list[list[float]]) -> dict[str, Any]:
    """What all have, and the sum and maximum of vectors, one of each process."""
    peers = Peers(distributed.group.WORLD)
    vector = torch.tensor(sums[rank], dtype=torch.float64)
    highest = vector.clone()
    gathered = peers.gather(torch.tensor(lists[rank], dtype=torch.int64))
    sent = peers.traffic.sent
    peers.add(vector)
    peers.highest(highest)
    return {"gathered": gathered, "sent_for_it": sent, "sum": vector, "highest": highest, "sent": peers.traffic.sent}


def exchange(rank: int, directory: Path, *, n_rows: list[list[int]]) -> dict[str, Any]:
    """Rows that say from whom to whom they are."""
    peers = Peers(distributed.group.WORLD)
    outgoing = [torch.full((n, 2), 10 * rank + other) for other, n in enumerate(n_rows[rank])]
    received = peers.exchange(torch.cat(outgoing), n_rows[rank], [row[rank] for row in n_rows])
    return {"received": received[:, 0].tolist(), "sent": peers.traffic.sent}


def rows(rank: int, directory: Path, *, kind: str, shape: tuple[int, int], wanted: list[list[int]]) -> dict[str, Any]:
    """Rows of a matrix that is spread, and which they are."""
    whole = torch.arange(shape[0] * shape[1], dtype=torch.float32).view(shape)
    traffic = Traffic()
    ids = [np.array(ids, dtype=np.int64) for ids in wanted]
    found = rows_of(_spread(whole, kind), ids, rank, torch.device("cpu"), traffic)
    return {"found": found, "expected": whole[ids[rank]], "sent": traffic.sent}


def _spread(whole: torch.Tensor, kind: str) -> Any:
    if kind == "whole":
        return whole
    if kind == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        return distribute_tensor(whole, init_device_mesh("cpu", (distributed.get_world_size(),)), [Shard(0)])
    return _FlatPart(whole)


class _FlatPart(torch.nn.Parameter):
    """What ZeRO-3 leaves of a parameter: nothing, and beside it an equal part of the flat elements."""

    def __new__(cls, whole: torch.Tensor) -> Any:
        weight: Any = super().__new__(cls, torch.empty(0), requires_grad=False)
        rank, size = distributed.get_rank(), -(-whole.numel() // distributed.get_world_size())
        flat = torch.nn.functional.pad(whole.flatten(), (0, size * distributed.get_world_size() - whole.numel()))
        weight.ds_shape, weight.ds_status, weight.ds_process_group = whole.shape, None, distributed.group.WORLD
        weight.ds_tensor = flat[rank * size : (rank + 1) * size].clone()
        weight.ds_tensor.ds_numel = size
        return weight


def meet(rank: int, directory: Path, *, scores: list[list[list[float]]], n_of_peer: tuple[int, ...], k: int) -> Any:
    """The best entries of this process' samples, of whose scores each process has some."""
    score = torch.tensor(scores[rank])
    place = torch.arange(score.shape[1]).repeat(len(score), 1) * len(scores) + rank
    none = torch.zeros(0, dtype=torch.int64)
    responses = Responses(row_R=none, order_R=none, n_rows=len(score), n_orders=0)
    meeting = Meeting(Peers(distributed.group.WORLD), responses, torch.arange(len(score)), n_of_peer, n_of_peer)
    best = score.topk(min(k, score.shape[1]), dim=1)
    found = Candidates(best.values, place.gather(1, best.indices))
    received = meeting.exchange([found, found])
    return [merge_candidates(parts, k) for parts in received]


def same_object(rank: int, directory: Path) -> Any:
    return Processes().from_main(lambda: {"rank": rank, "array": np.arange(3) + rank})

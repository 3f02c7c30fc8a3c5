"""A model that is too big for one device: its weights divided among the processes by FSDP2.

The first process reads the model into the memory of its machine; the others get their parts from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mui_callback.parallel.processes import Processes


def load_divided(
    load: Callable[[], nn.Module], skeleton: Callable[[], nn.Module], *, device: str, processes: Processes
) -> nn.Module:
    """The model in eval mode, with each process holding a part of every weight.

    Args:
        load: reads the model to the CPU; called in the main process.
        skeleton: makes it without weights, in all others.
        device: that forward passes run on.
        processes: all of them.

    Raises:
        Exception: it cannot be read; in every process.
    """
    whole = processes.together(lambda: load() if processes.is_main else None)
    model = processes.together(lambda: whole if whole is not None else _empty(skeleton()))
    # A copy: dividing takes the weights out of the model.
    state = {} if whole is None else {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    mesh = init_device_mesh(torch.device(device).type, (distributed.get_world_size(),))
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state, options=options)
    for buffer in _own_buffers(model, device):
        distributed.broadcast(buffer, src=0)
    return model.eval()


def _empty(skeleton: nn.Module) -> nn.Module:
    """On the CPU, with memory that nobody has touched and so takes no room."""
    model: Any = skeleton.to_empty(device="cpu")
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return skeleton


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """What the outermost lists of modules hold: the layers of a transformer."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _layers(child)


def _own_buffers(model: nn.Module, device: str) -> Iterator[torch.Tensor]:
    """Those that no checkpoint has, such as the frequencies of positions."""
    for module in model.modules():
        for name in sorted(module._non_persistent_buffers_set):
            buffer = module._buffers[name]
            if buffer is not None:
                module._buffers[name] = buffer = buffer.to(device)
                yield buffer

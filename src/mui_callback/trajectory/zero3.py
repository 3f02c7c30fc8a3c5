"""Whole weights from the parts that the processes of DeepSpeed's ZeRO 3 leave.

Each process has an equal part of every parameter. Those of parameters that are trained lie one after the other in its
optimizer's flat groups; those of others are kept by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mui_callback.loading import ModelLoadError

State = dict[str, Tensor]


def whole_weights(models: Sequence[Mapping[str, Any]], optimizers: Sequence[Mapping[str, Any]], *, where: str) -> State:
    """Put the parts together.

    Args:
        models: the ``model_states`` of all processes, in the order of their ranks.
        optimizers: their ``optim_states``.
        where: names the checkpoint in messages.

    Raises:
        ModelLoadError: the parts do not fit together.
    """
    first, n = models[0], len(models)
    if any("autoep_layers" in name and layers for name, layers in first.items()):
        raise ModelLoadError(f"{where}: experts that DeepSpeed's AutoEP has split are not put together here")
    shapes = {name: shape for group in first["param_shapes"] for name, shape in group.items()}
    groups = [optimizer["optimizer_state_dict"]["fp32_flat_groups"] for optimizer in optimizers]
    expected, sizes = sum(_part(shape, n) for shape in shapes.values()), [sum(map(len, own)) for own in groups]
    if sizes != [expected] * n:
        raise ModelLoadError(f"{where}: expected {expected} weights of each of {n} processes, got {sizes}")

    state: State = {name: first["module"][name] for name in first["buffer_names"]}
    for name, shape in (first.get("frozen_param_shapes") or {}).items():
        state[name] = _whole([model["frozen_param_fragments"][name] for model in models], shape)
    start = 0
    for name, shape in shapes.items():
        end = start + _part(shape, n)
        state[name] = _whole([_cut(own, start, end) for own in groups], shape)
        start = end
    return state | {name: state[kept] for name, kept in first["shared_params"].items() if kept in state}


def _part(shape: torch.Size, n: int) -> int:
    """Elements of a parameter that each process has."""
    return -(-shape.numel() // n)


def _cut(groups: Sequence[Tensor], start: int, end: int) -> Tensor:
    """A stretch of what lies in several tensors, one after the other."""
    parts = []
    for group in groups:
        parts.append(group[max(start, 0) : max(end, 0)])
        start, end = start - group.numel(), end - group.numel()
    return torch.cat(parts)


def _whole(parts: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """The last part is padded."""
    return torch.cat([*parts])[: shape.numel()].view(shape)

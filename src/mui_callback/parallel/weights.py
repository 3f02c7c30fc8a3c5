"""Weights that are spread over processes: what they are like when whole, and how to keep them whole for a while.

Two kinds are known: parameters of ZeRO stage 3 (DeepSpeed partitions the flat parameter and marks it with ``ds_…``
attributes) and of FSDP2 (`torch.distributed.fsdp.fully_shard` makes DTensors of them). In both, hooks of modules make
them whole before a forward and spread them again after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from mui_callback.errors import UnsupportedModelError

_PIN = "mui-callback"
"""Stands for one more module that uses a parameter of ZeRO, so that it is not let go."""


def whole_shape(weight: Tensor) -> torch.Size:
    """The shape that a weight has when it is whole."""
    shape: torch.Size = getattr(weight, "ds_shape", weight.shape)
    return shape


def is_dtensor(weight: object) -> bool:
    """Whether it is a DTensor, or a parameter that holds one."""
    return isinstance(weight, Tensor) and hasattr(weight, "placements") and hasattr(weight, "device_mesh")


def is_zero3(weight: object) -> bool:
    """Whether ZeRO stage 3 takes care of it, partitioned at present or not."""
    return hasattr(weight, "ds_shape") and hasattr(weight, "ds_status")


def is_apart(weight: Tensor) -> bool:
    """Whether only a part of it is in this process at present."""
    return is_dtensor(weight) or (is_zero3(weight) and weight.numel() != whole_shape(weight).numel())


def is_spread(model: nn.Module) -> bool:
    """Whether weights are made whole by hooks, so that processes exchange them in each forward."""
    modules = list(model.modules())
    weights = (weight for module in modules for weight in module._parameters.values())  # faster than `parameters`
    return any(map(is_zero3, weights)) or any(_fsdp_modules(modules))


def settle_roots(model: nn.Module) -> None:
    """Let FSDP2 know its outermost modules, as the first forward of the whole model does.

    A forward of a part of it that comes first would be taken for that of the whole, and the whole be refused later.

    Args:
        model: the whole of what is trained.
    """
    inside: set[nn.Module] = set()
    for module in _fsdp_modules(model.modules()):
        if module not in inside and module._get_fsdp_state()._is_root is None:
            module._get_fsdp_state()._lazy_init()
        inside |= set(module.modules())


def fsdp_weights(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The weights that FSDP2 takes care of, by module and name: loading a checkpoint puts others in their place."""
    groups = [group for module in _fsdp_modules(model.modules()) for group in _groups(module)]
    places = [weight._module_info for group in groups for weight in group.fsdp_params]
    return [(place.module, place.param_name) for place in places]


def spread_over(model: nn.Module) -> set[int]:
    """Ranks of the processes that weights are spread over, by FSDP2 or ZeRO-3."""
    of_fsdp = [getattr(module, name) for module, name in fsdp_weights(model)]
    return {rank for weight in (*of_fsdp, *model.parameters()) if is_divided(weight) for rank in _group_ranks(weight)}


def is_divided(weight: Tensor) -> bool:
    """Whether FSDP2 or ZeRO-3 has it in several processes, whole at present or not."""
    return (is_dtensor(weight) or is_zero3(weight)) and len(_group_ranks(weight)) > 1


def _group_ranks(weight: Any) -> list[int]:
    """Ranks of the processes that have a part or a copy of a weight that is spread."""
    if is_zero3(weight):
        ranks: list[int] = distributed.get_process_group_ranks(weight.ds_process_group)
        return ranks
    whole: list[int] = weight.device_mesh.mesh.flatten().tolist()
    return whole


def common_device(model: nn.Module) -> torch.device:
    """The device that a model computes on; weights that are spread may wait elsewhere.

    Raises:
        UnsupportedModelError: there are several.
    """
    devices = sorted(map(str, {_device(weight) for weight in model.parameters()}))
    if len(devices) != 1 or devices[0].startswith(("mps", "meta")):
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected all weights on one CPU or CUDA device, got them on {', '.join(devices)}"
        )
    return torch.device(devices[0])


def _device(weight: Any) -> torch.device:
    on_gpu = False
    if is_dtensor(weight):
        on_gpu = weight.device_mesh.device_type == "cuda"
    elif is_zero3(weight):
        on_gpu = distributed.get_backend(weight.ds_process_group) == "nccl"
    device: torch.device = weight.device
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu and device.type == "cpu" else device


class KeptWhole:
    """Keeps the weights of some modules whole from when a forward has made them so.

    Args:
        modules: the modules; what is inside of them must be among them.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        inside = list(modules)
        self._fsdp = [module for module in _fsdp_modules(inside) if any(group.is_sharded for group in _groups(module))]
        parameters = {id(weight): weight for module in inside for weight in module.parameters(recurse=False)}
        self._zero3: list[Any] = [weight for weight in parameters.values() if is_zero3(weight)]

    def begin(self) -> None:
        """From now on, until `end`."""
        for weight in self._zero3:
            weight.ds_active_sub_modules.add(_PIN)

    def end(self) -> None:
        """Let go of them; nothing happens if they are not kept."""
        for weight in self._zero3:
            if _PIN not in weight.ds_active_sub_modules:
                continue
            weight.ds_active_sub_modules.discard(_PIN)
            if not weight.ds_persist and not weight.ds_active_sub_modules and weight.ds_status.name == "AVAILABLE":
                weight.partition()
        for module in self._fsdp:
            module.reshard()

    @contextmanager
    def possible(self) -> Iterator[None]:
        """While this lasts, `begin` and `end` may be called."""
        with ExitStack() as stack:
            stack.callback(self.end)
            for module in self._fsdp:
                stack.enter_context(_staying_whole(module))
            yield


@contextmanager
def engines_at_rest(model: nn.Module) -> Iterator[None]:
    """What FSDP2 and ZeRO prepare in a forward for its backward pass is left out: there will be none.

    Weights that are whole at the end without having been at the beginning are spread again.
    """
    modules = list(model.modules())
    with ExitStack() as stack:
        for module in _fsdp_modules(modules):
            if any(group.is_sharded for group in _groups(module)):  # of its own: modules inside have theirs
                stack.callback(module.reshard)
            else:
                stack.enter_context(_staying_whole(module))
            for handle in _without_grad(module):
                stack.enter_context(handle)
        for owner in modules:
            # Attributes of modules are restored by whoever freezes them.
            for name in {"pre_bwd_fn", "post_bwd_fn"} & vars(owner).keys():
                setattr(owner, name, _Nothing)
        yield


class _Nothing:
    """In the place of an autograd function that calls ZeRO in a backward pass."""

    @staticmethod
    def apply(tensor: Tensor) -> Tensor:
        return tensor


def _without_grad(module: nn.Module) -> Iterator[Any]:
    """Hooks around those of FSDP2, which prepare a backward pass if gradients are recorded."""
    modes: list[bool] = []

    def off(*_: Any) -> None:
        modes.append(torch.is_grad_enabled())
        torch.set_grad_enabled(False)

    def back(*_: Any) -> None:
        torch.set_grad_enabled(modes.pop())

    yield module.register_forward_pre_hook(off, prepend=True)
    yield module.register_forward_pre_hook(back)
    yield module.register_forward_hook(off, prepend=True)
    yield module.register_forward_hook(back)


@contextmanager
def _staying_whole(module: Any) -> Iterator[None]:
    """A module of FSDP2 does not spread its weights when its forward ends."""
    state, groups = module._get_fsdp_state(), _groups(module)
    before = [(group, group.post_forward_mesh_info) for group in groups]
    automatic = getattr(state, "_auto_reshard_after_forward", None)
    module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for group, mesh_info in before:
            group.post_forward_mesh_info = mesh_info
        if automatic is not None:
            state._auto_reshard_after_forward = automatic


def _groups(module: Any) -> list[Any]:
    """The parameters that a module of FSDP2 takes care of."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # torch before 2.12 has one
        groups = [group for group in (state._fsdp_param_group,) if group is not None]
    return list(groups)


def _fsdp_modules(modules: Iterable[nn.Module]) -> Iterator[Any]:
    try:
        from torch.distributed.fsdp import FSDPModule
    except ImportError:  # torch before 2.6, or built without torch.distributed
        return iter(())
    return (module for module in modules if isinstance(module, FSDPModule))


def check_readable(where: str, weight: object) -> None:
    """Make sure that a weight will be there, whole and with a dtype to compute with, when its module runs.

    Raises:
        UnsupportedModelError: it will not.
    """
    if not isinstance(weight, Tensor):
        return
    if is_zero3(weight):
        return
    if weight.numel() == 0:
        raise UnsupportedModelError(
            f"{where}: expected a weight of this process, or of ZeRO stage 3 or FSDP2, got an empty "
            f"{type(weight.data).__name__} of shape {tuple(weight.shape)}. Other ways to spread weights over processes "
            "(FSDP1) cannot be probed."
        )

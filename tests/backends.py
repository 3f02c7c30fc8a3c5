"""Models as they are trained over several processes, and the same weights whole in a single one.

Everything runs on the CPU over gloo. Packages that only some backends need are imported where they are built.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedModel

from plain_moe import GatedMLP, PlainLM, build_plain, sequential_mlp, several
from tiny import build, drawn

ODD_VOCAB = 385  # rows of the head are not the same number in each process
D, WIDTH = 24, 16
LEARNING_RATE = 1e-2

Expert = Callable[[int, int], nn.Module]  # model width, expert width


class Trainee(NamedTuple):
    """What a process has of a training."""

    model: nn.Module
    """What a user would hand over: an engine, a wrapped or a sharded module; in training mode."""
    train_step: Callable[[Tensor], float]
    """One optimizer step on token ids ``[B, T]``; gives the loss of this process."""


@dataclass(frozen=True)
class Backend:
    """One way to train over several processes."""

    name: str
    size: int
    """Processes."""
    build: Callable[[], Trainee]
    """Called in each process, once there is a process group."""
    reference: Callable[[], nn.Module]
    """Called in a process without others: a plain module in eval mode with the same weights, whole."""
    is_same_batch: bool = False
    """Whether processes have to be given the same tokens, as each computes a part of the same forward pass."""


def language_loss(output: Any, input_ids: Tensor) -> Tensor:
    logits = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())


def _step(model: nn.Module, optimizer: Any, backward: Callable[[Tensor], Any], input_ids: Tensor) -> float:
    loss = language_loss(model(input_ids), input_ids)
    backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _trained_in_torch(model: nn.Module) -> Trainee:
    # One tensor at a time: those of different meshes do not go together.
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, foreach=False)
    return Trainee(model.train(), partial(_step, model, optimizer, Tensor.backward))


def tell_environment() -> None:
    """What a launcher would; and that DeepSpeed, which others import too, is to stay on the CPU."""
    rank, size = str(distributed.get_rank()), str(distributed.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")


# Whole copies: DistributedDataParallel, Accelerate


def build_ddp(reference: Callable[[], nn.Module]) -> Trainee:
    return _trained_in_torch(DistributedDataParallel(reference()))


def build_accelerate(reference: Callable[[], nn.Module]) -> Trainee:
    tell_environment()  # Accelerate takes a process without these for one that is alone
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = reference()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE))
    return Trainee(model.train(), partial(_step, model, optimizer, accelerator.backward))


# FSDP2


def build_fsdp2(reference: Callable[[], PreTrainedModel], *, is_nested: bool = False) -> Trainee:
    """Shard each layer and the rest; if nested, also the block and the experts of each layer by themselves."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    model = reference()
    for layer in model.model.layers:
        for module in (layer.mlp.experts, layer.mlp, layer) if is_nested else (layer,):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return _trained_in_torch(model)


# DeepSpeed: ZeRO, AutoEP


def build_deepspeed(
    reference: Callable[[], nn.Module],
    *,
    stage: int,
    leaf: str | None = None,
    parameters: Callable[[nn.Module], Iterable[Any]] = nn.Module.parameters,
    **config: Any,
) -> Trainee:
    """An engine of DeepSpeed.

    Args:
        reference: the model as it is before.
        stage: of ZeRO.
        leaf: name of the modules whose weights are fetched in one, in each layer of the model.
        parameters: for the optimizer, or groups of them.
        config: of DeepSpeed, beside the usual.
    """
    deepspeed = deepspeed_on_cpu()
    model = reference()
    if leaf is not None:
        deepspeed.utils.set_z3_leaf_modules(model, [type(getattr(model.layers[-1], leaf))])
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "torch_adam": True}},
        # Without the threshold ZeRO-3 would leave parameters as small as these whole.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        **config,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters(model), config=config)
    engine.train()  # gives nothing
    return Trainee(engine, partial(_engine_step, engine))


def _engine_step(engine: Any, input_ids: Tensor) -> float:
    loss = language_loss(engine(input_ids), input_ids)
    engine.backward(loss)
    engine.step()
    return loss.item()


def deepspeed_on_cpu() -> ModuleType:
    """DeepSpeed, on the CPU, without the helper for inference that it would compile for more than a minute."""
    tell_environment()
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


# DeepSpeed: its own MoE


@dataclass(frozen=True)
class Mixture:
    """What is in the MoE layers."""

    k: int
    """Experts of a token."""
    n_experts: int = 4
    expert: Expert = GatedMLP
    is_residual: bool = False
    """Whether an MLP beside the experts takes part in the output."""
    is_one_sided: bool = False
    """Whether all tokens go to the first half of the experts."""


class Routed(nn.Module):
    """What DeepSpeed's MoE computes when it drops no token and chooses no expert at random."""

    def __init__(self, mixture: Mixture) -> None:
        super().__init__()
        self.mixture = mixture
        self.router = nn.Linear(D, mixture.n_experts, bias=False)
        self.experts = several(mixture.expert, D, WIDTH, mixture.n_experts)
        if mixture.is_residual:
            self.mlp, self.coefficient = mixture.expert(D, WIDTH), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weight, idx = self.router(flat).softmax(-1).topk(self.mixture.k)
        if self.mixture.k > 1:
            weight = weight / weight.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(idx == e)
            out.index_add_(0, token, expert(flat[token]) * weight[token, slot, None])
        out = out.view(x.shape)
        if self.mixture.is_residual:
            coefficients = self.coefficient(x).softmax(-1)
            out = out * coefficients[..., :1] + self.mlp(x) * coefficients[..., 1:]
        return out


def routed_lm(mixture: Mixture) -> nn.Module:
    """A decoder whose first layer is dense."""
    torch.manual_seed(0)
    model = drawn(_decoder(partial(Routed, mixture)), seed=0)
    return one_sided(model) if mixture.is_one_sided else model


def one_sided(model: nn.Module) -> nn.Module:
    """Let all routers prefer the first half of the experts, whatever the token: of two rows of opposite signs one is
    positive, and those of the other half are zero."""
    for name, weight in model.named_parameters():
        if name.endswith((".router.weight", ".gate.weight")):
            with torch.no_grad():
                half = len(weight) // 2
                weight[1:half:2] = -weight[0 : half - 1 : 2]
                weight[half:] = 0
    return model


def _one_sided(reference: Callable[[], nn.Module]) -> nn.Module:
    return one_sided(reference())


def build_deepspeed_moe(mixture: Mixture, *, ep_size: int, stage: int) -> Trainee:
    return build_deepspeed(partial(_deepspeed_lm, mixture, ep_size), stage=stage, parameters=_moe_groups)


def _decoder(block: Callable[[], nn.Module]) -> PlainLM:
    return PlainLM(lambda n: block() if n else GatedMLP(D, 40), block_name="moe")


def _deepspeed_lm(mixture: Mixture, ep_size: int) -> nn.Module:
    """The part that this process has of `routed_lm`; tokens are dropped and experts drawn, as by default."""
    from deepspeed.moe.layer import MoE

    options = {"num_experts": mixture.n_experts, "k": mixture.k, "ep_size": ep_size}
    model = _decoder(lambda: MoE(D, mixture.expert(D, WIDTH), use_residual=mixture.is_residual, **options))
    n_local = mixture.n_experts // ep_size
    first = distributed.get_rank() % ep_size * n_local
    state = {}
    for name, value in routed_lm(mixture).state_dict().items():
        name = name.replace(".router.", ".deepspeed_moe.gate.wg.")
        if expert := re.search(r"\.experts\.(\d+)\.", name):
            number = int(expert[1]) - first
            if not 0 <= number < n_local:
                continue
            name = name.replace(expert[0], f".deepspeed_moe.experts.deepspeed_experts.{number}.")
        state[name] = value
    model.load_state_dict(state)
    return model


def _moe_groups(model: nn.Module) -> list[dict[str, Any]]:
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    return split_params_into_different_moe_groups_for_optimizer({"params": [*model.parameters()], "name": "all"})


# Expert parallelism of transformers


def build_hf_ep(reference: Callable[[], PreTrainedModel], **config: Any) -> Trainee:
    """The model loaded from a checkpoint of it, since only then is it distributed.

    With a `tp_size` the dense modules are sharded too, the head among them; they cannot be left out.
    """
    from transformers.distributed import DistributedConfig

    tell_environment()
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        distributed.broadcast_object_list(shared)
        if own == shared[0]:
            reference().save_pretrained(own)
        distributed.barrier()
        model = AutoModelForCausalLM.from_pretrained(
            shared[0], dtype=torch.float32, distributed_config=DistributedConfig(**config)
        )
        distributed.barrier()
    return _trained_in_torch(model)


# All of them


def _backend(
    name: str, build_it: Callable[..., Trainee], reference: Callable[[], nn.Module], *, size: int = 2, **options: Any
) -> Backend:
    return Backend(name, size, partial(build_it, reference, **options), reference)


def _deepspeed_moe(name: str, mixture: Mixture, *, size: int = 2, **options: Any) -> Backend:
    build_it = partial(build_deepspeed_moe, mixture, **{"ep_size": 2, "stage": 1, **options})
    return Backend(name, size, build_it, partial(routed_lm, mixture))


def _auto_ep(**options: Any) -> dict[str, Any]:
    return {"expert_parallel": {"enabled": True, "autoep_size": 2, **options}}


_QWEN = partial(build, "qwen2_moe")
ODD_QWEN = partial(build, "qwen2_moe", vocab_size=ODD_VOCAB)
_LISTED = partial(build_plain, "qwen2")
_DEEPSEEK = partial(build, "deepseek_v3")
_OLMOE = partial(build, "olmoe")
_QWEN3 = partial(build, "qwen3_moe")
_ONE_SIDED = partial(_one_sided, partial(build, "qwen3_moe", num_experts=8))
_ALL = (
    _backend("ddp", build_ddp, _QWEN),
    _backend("accelerate", build_accelerate, _QWEN),
    _backend("fsdp2", build_fsdp2, ODD_QWEN),
    _backend("fsdp2_nested", build_fsdp2, ODD_QWEN, is_nested=True),
    _backend("zero1", build_deepspeed, ODD_QWEN, stage=1),
    _backend("zero2", build_deepspeed, ODD_QWEN, stage=2),
    _backend("zero3", build_deepspeed, ODD_QWEN, stage=3),
    _backend("zero3_list", build_deepspeed, _LISTED, stage=3, leaf="mlp"),
    _deepspeed_moe("moe_k1", Mixture(1, expert=sequential_mlp)),
    _deepspeed_moe("moe_k2", Mixture(2), stage=2),
    _deepspeed_moe("moe_k4", Mixture(4, n_experts=8)),
    _deepspeed_moe("moe_residual", Mixture(1, is_residual=True)),
    _deepspeed_moe("moe_ep1", Mixture(2), ep_size=1),
    _deepspeed_moe("moe_ep2_dp2", Mixture(2, expert=sequential_mlp), size=4),
    _backend("autoep", build_deepspeed, _DEEPSEEK, stage=2, **_auto_ep()),
    _backend("autoep_olmoe", build_deepspeed, _OLMOE, stage=1, **_auto_ep(preset_model="qwen3_moe")),
    _backend("autoep_zero3", build_deepspeed, _DEEPSEEK, stage=3, **_auto_ep()),
    _backend("hf_ep_all_to_all", build_hf_ep, _QWEN3, ep_size=2, fsdp_size=2, ep_implementation="all_to_all"),
    _deepspeed_moe("moe_k1_one_sided", Mixture(1, is_one_sided=True)),
    _backend("hf_ep_one_sided", build_hf_ep, _ONE_SIDED, ep_size=2, fsdp_size=2, ep_implementation="all_to_all"),
    _backend("autoep_one_sided", build_deepspeed, partial(_one_sided, _DEEPSEEK), stage=2, **_auto_ep()),
    _backend("hf_ep_efsdp2", build_hf_ep, _QWEN3, size=4, ep_size=2, fsdp_size=4),
    replace(
        _backend("hf_ep_shared", build_hf_ep, _QWEN, ep_size=2, tp_size=2, ep_implementation="all_reduce"),
        is_same_batch=True,
    ),
    replace(
        _backend("hf_ep_all_reduce", build_hf_ep, _QWEN3, ep_size=2, tp_size=2, ep_implementation="all_reduce"),
        is_same_batch=True,
    ),
)
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in _ALL}

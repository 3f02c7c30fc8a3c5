"""Models of a billion parameters or more as two processes train them, and their whole weights for one process.

They are made on the device, from a seed. Packages that only some backends need are imported where they are built.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

_AS_IN_A_PROBE = {"drop_tokens": False, "use_rts": False, "top2_2nd_expert_sampling": False}
"""Settings of DeepSpeed's routers."""
_AUXILIARY = 0.1
"""Weight of the loss that keeps the experts of DeepSpeed's MoE equally busy."""


@dataclass(frozen=True)
class Place:
    """Where a model is made, and from what."""

    device: torch.device
    dtype: torch.dtype
    is_tiny: bool
    seed: int
    batch_size: int
    """Sequences that each process trains on in a step."""

    @property
    def learning_rate(self) -> float:
        return 1e-2 if self.is_tiny else 3e-4


class Trainee(NamedTuple):
    """What a process has of a training."""

    model: nn.Module
    """What a user would hand over: an engine, a wrapped or a sharded module."""
    step: Callable[[Tensor], float]
    """One optimizer step on token ids ``[B, T]``; gives the loss of this process."""


def language_loss(output: Any, input_ids: Tensor) -> Tensor:
    logits = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten())


# A decoder in plain torch


@dataclass(frozen=True)
class Sizes:
    vocab: int = 32000
    d: int = 2048
    n_layers: int = 5
    """The first one is dense."""
    n_heads: int = 16
    dense_width: int = 8192
    n_experts: int = 16
    width: int = 4096
    k: int = 2
    n_positions: int = 2048


_TINY = Sizes(vocab=384, d=32, n_layers=3, n_heads=2, dense_width=40, n_experts=4, width=16, n_positions=512)


class SwiGLU(nn.Module):
    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(d, width, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(width, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Routed(nn.Module):
    """What DeepSpeed's MoE computes when it drops no token and chooses no expert at random."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.k = sizes.k
        self.router = nn.Linear(sizes.d, sizes.n_experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(sizes.d, sizes.width) for _ in range(sizes.n_experts))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weight, idx = F.linear(flat.float(), self.router.weight.float()).softmax(-1).topk(self.k)
        weight = weight / weight.sum(-1, keepdim=True)
        out = torch.zeros_like(flat, dtype=torch.float32)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(idx == e)
            out.index_add_(0, token, expert(flat[token]) * weight[token, slot, None])
        return out.to(x.dtype).view(x.shape)


class Layer(nn.Module):
    def __init__(self, sizes: Sizes, block: nn.Module) -> None:
        super().__init__()
        self.n_heads = sizes.n_heads
        self.attention_norm, self.norm = nn.RMSNorm(sizes.d), nn.RMSNorm(sizes.d)
        self.qkv_proj, self.o_proj = (nn.Linear(sizes.d, n * sizes.d, bias=False) for n in (3, 1))
        self.moe = block

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv_proj(self.attention_norm(x)).unflatten(-1, (3, self.n_heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        x = x + self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        out = self.moe(self.norm(x))
        return x + (out[0] if isinstance(out, tuple) else out)


class DecoderLM(nn.Module):
    def __init__(self, sizes: Sizes, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(sizes.vocab, sizes.d)
        self.embed_positions = nn.Embedding(sizes.n_positions, sizes.d)
        blocks = (block() if n else SwiGLU(sizes.d, sizes.dense_width) for n in range(sizes.n_layers))
        self.layers = nn.ModuleList(Layer(sizes, block) for block in blocks)
        self.norm, self.lm_head = nn.RMSNorm(sizes.d), nn.Linear(sizes.d, sizes.vocab, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Padding is on the right, so that no mask is needed."""
        x = self.embed_tokens(input_ids) + self.embed_positions.weight[: input_ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def _sizes(place: Place) -> Sizes:
    return _TINY if place.is_tiny else Sizes()


def _decoder(place: Place, block: Callable[[], nn.Module]) -> nn.Module:
    with place.device:
        return DecoderLM(_sizes(place), block).to(place.dtype)


def _whole_names(name: str, place: Place, rank: int) -> str:
    """The name in `Routed` of a parameter that a process has in DeepSpeed's MoE."""
    first = rank * _sizes(place).n_experts // distributed.get_world_size()
    name = name.replace(".deepspeed_moe.gate.wg.", ".router.")
    pattern = r"\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\."
    return re.sub(pattern, lambda number: f".experts.{first + int(number[1])}.", name)


@torch.no_grad()
def _draw(model: nn.Module, place: Place) -> None:
    """Each matrix from a seed of its own, the same in whichever process it is."""
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            seed = zlib.crc32(f"{place.seed}/{_whole_names(name, place, distributed.get_rank())}".encode())
            generator = torch.Generator(weight.device).manual_seed(seed)
            # embeddings as large as what layers add to them, so that tokens differ and no expert gets all of them
            scale = 1.0 if "embed_tokens" in name else weight.shape[-1] ** -0.5
            weight.normal_(0, scale, generator=generator)


# Models of transformers

_COMMON = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "moe_intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "use_cache": False,
}
_COMMON_TINY = {
    **_COMMON,
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 32**-0.5,
}


def _deepseek_v3(place: Place) -> Any:
    from transformers import DeepseekV3Config

    kind = {"norm_topk_prob": True, "n_shared_experts": 2}
    if place.is_tiny:
        experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
        heads = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
        return DeepseekV3Config(**_COMMON_TINY, **kind, **experts, **heads, first_k_dense_replace=1)
    experts = {"n_routed_experts": 64, "num_experts_per_tok": 6, "n_group": 8, "topk_group": 4}
    heads = {
        "q_lora_rank": 512,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 96,
        "qk_rope_head_dim": 32,
        "v_head_dim": 128,
    }
    return DeepseekV3Config(**_COMMON, **kind, **experts, **heads, first_k_dense_replace=1)


def _qwen3_moe(place: Place) -> Any:
    from transformers import Qwen3MoeConfig

    if place.is_tiny:
        return Qwen3MoeConfig(**_COMMON_TINY, num_experts=8, num_experts_per_tok=2, head_dim=16, norm_topk_prob=True)
    return Qwen3MoeConfig(**_COMMON, num_experts=64, num_experts_per_tok=8, head_dim=128, norm_topk_prob=True)


def _pretrained(config: Callable[[Place], Any], place: Place) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(place.seed)
    with place.device:
        return AutoModelForCausalLM.from_config(config(place), dtype=place.dtype)


# As they are trained


def _step(model: nn.Module, optimizer: Any, input_ids: Tensor) -> float:
    loss = language_loss(model(input_ids), input_ids)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _trained_in_torch(model: nn.Module, place: Place) -> Trainee:
    return Trainee(model.train(), partial(_step, model, torch.optim.AdamW(model.parameters(), lr=place.learning_rate)))


def _ddp(place: Place) -> Trainee:
    return _trained_in_torch(DistributedDataParallel(_pretrained(_qwen3_moe, place)), place)


def _fsdp2(place: Place) -> Trainee:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(place.device.type, (distributed.get_world_size(),))
    model = _pretrained(_qwen3_moe, place)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return _trained_in_torch(fully_shard(model, mesh=mesh), place)


def _engine_step(engine: Any, input_ids: Tensor) -> float:
    loss = language_loss(engine(input_ids), input_ids)
    auxiliary = [module.l_aux for module in engine.modules() if hasattr(module, "l_aux")]
    engine.backward(loss + _AUXILIARY * sum(auxiliary))
    engine.step()
    return loss.item()


def _deepspeed(place: Place) -> Any:
    if place.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    if place.device.type == "cpu":  # a helper for inference would be compiled for more than a minute
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _trained_in_deepspeed(model: nn.Module, parameters: Any, place: Place, **config: Any) -> Trainee:
    config = {
        "train_micro_batch_size_per_gpu": place.batch_size,
        "optimizer": {"type": "AdamW", "params": {"lr": place.learning_rate, "torch_adam": True}},
        "bf16": {"enabled": place.dtype == torch.bfloat16},
        "zero_optimization": {"stage": 2},
        **config,
    }
    engine, *_ = _deepspeed(place).initialize(model=model, model_parameters=parameters, config=config)
    engine.train()  # gives nothing
    return Trainee(engine, partial(_engine_step, engine))


def _deepspeed_moe(place: Place) -> Trainee:
    _deepspeed(place)
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    sizes = _sizes(place)
    options = {"num_experts": sizes.n_experts, "k": sizes.k, "ep_size": distributed.get_world_size()}
    model = _decoder(place, lambda: MoE(sizes.d, SwiGLU(sizes.d, sizes.width), **options))
    _draw(model, place)
    groups = split_params_into_different_moe_groups_for_optimizer({"params": [*model.parameters()], "name": "all"})
    return _trained_in_deepspeed(model, groups, place)


def _autoep(place: Place) -> Trainee:
    model = _pretrained(_deepseek_v3, place)
    expert_parallel = {"enabled": True, "autoep_size": distributed.get_world_size()}
    return _trained_in_deepspeed(model, model.parameters(), place, expert_parallel=expert_parallel)


def drops_tokens(model: nn.Module) -> bool:
    """Whether it has routers of DeepSpeed, which do so by default."""
    return any(hasattr(module, "drop_tokens") for module in model.modules())


@contextmanager
def all_tokens_kept(model: nn.Module) -> Iterator[None]:
    """The routers of DeepSpeed drop no tokens inside and draw no experts, as in a probe."""
    routers: list[Any] = [module for module in model.modules() if hasattr(module, "drop_tokens")]
    before = [{name: getattr(router, name) for name in _AS_IN_A_PROBE} for router in routers]
    try:
        for router in routers:
            vars(router).update(_AS_IN_A_PROBE)
        yield
    finally:
        for router, settings in zip(routers, before, strict=True):
            vars(router).update(settings)


# Whole weights


def _from_all(value: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(value) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, value.contiguous())
    return parts


def _whole_fsdp2(model: nn.Module, place: Place) -> Iterator[tuple[str, Tensor]]:
    for name, value in model.state_dict().items():
        yield name, value.full_tensor() if hasattr(value, "full_tensor") else value


def _whole_deepspeed_moe(model: nn.Module, place: Place) -> Iterator[tuple[str, Tensor]]:
    for name, value in model.state_dict().items():
        parts = _from_all(value) if ".deepspeed_experts." in name else [value]
        for rank, part in enumerate(parts):
            yield _whole_names(name, place, rank), part


def _whole_autoep(model: nn.Module, place: Place) -> Iterator[tuple[str, Tensor]]:
    for name, value in model.state_dict().items():
        yield (
            name,
            torch.cat(_from_all(value)) if name.endswith((".experts.w1", ".experts.w2", ".experts.w3")) else value,
        )


def whole_weights(backend: Backend, model: nn.Module, place: Place) -> dict[str, Tensor]:
    """The weights of the whole model on the CPU, in process 0; nothing in the others, which make this call too."""
    inner: Any = model.module if hasattr(model, "module") else model
    is_first = distributed.get_rank() == 0
    return {name: value.detach().cpu() for name, value in backend.whole(inner, place) if is_first}


class Backend(NamedTuple):
    """One way to train over several processes."""

    build: Callable[[Place], Trainee]
    """Called in each process, once there is a process group."""
    whole: Callable[[nn.Module, Place], Iterator[tuple[str, Tensor]]]
    """The weights under the names of the reference; called in each process."""
    reference: Callable[[Place], nn.Module]
    """The same model in a process alone."""
    shares_experts: bool
    """Whether each process has some of the experts."""


def _whole_ddp(model: nn.Module, place: Place) -> Iterator[tuple[str, Tensor]]:
    yield from model.state_dict().items()


def _autoep_alone(place: Place) -> nn.Module:
    """DeepSpeed's router computes in bfloat16, that of transformers in float32; so here too it is DeepSpeed's."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")  # whoever starts processes sets them
    kind, store = "nccl" if place.device.type == "cuda" else "gloo", distributed.HashStore()
    distributed.init_process_group(kind, store=store, rank=0, world_size=1)
    return _autoep(place).model.module


def _routed_lm(place: Place) -> nn.Module:
    return _decoder(place, lambda: Routed(_sizes(place)))


BACKENDS = {
    "deepspeed_moe": Backend(_deepspeed_moe, _whole_deepspeed_moe, _routed_lm, True),
    "autoep": Backend(_autoep, _whole_autoep, _autoep_alone, True),
    "fsdp2": Backend(_fsdp2, _whole_fsdp2, partial(_pretrained, _qwen3_moe), False),
    "ddp": Backend(_ddp, _whole_ddp, partial(_pretrained, _qwen3_moe), False),
}

"""Models that are divided among processes in ways that cannot be probed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from backend_training import SETTINGS, many
from backends import deepspeed_on_cpu, tell_environment
from mui_callback import MUIProbe, ProbeSet
from mui_callback.errors import MUIError
from tiny import build
from tiny_samples import make_samples


def refusal(rank: int, directory: Path, *, kind: str) -> str:
    """What a process is told."""
    try:
        report = MUIProbe(MODELS[kind](), PROBE_SETS.get(kind, many)(), **SETTINGS).measure()
    except MUIError as error:
        return f"{type(error).__name__}: {error}"
    return f"{report.samples} samples, {report.pooled.loss}"


def _tensor_parallel_experts() -> nn.Module:
    """As transformers' own plan for tensor parallelism divides each expert."""
    return _from_pretrained("qwen3_moe", tp_size=2, tp_plan="auto")


def _tensor_parallel_attention() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = build("qwen2_moe")
    plan = {"q_proj": ColwiseParallel(), "k_proj": ColwiseParallel(), "v_proj": ColwiseParallel()}
    for layer in model.model.layers:
        parallelize_module(layer.self_attn, init_device_mesh("cpu", (2,)), {**plan, "o_proj": RowwiseParallel()})
    return model


def _stages() -> nn.Module:
    """Each process has other layers."""
    model = build("qwen2_moe")
    model.model.layers = model.model.layers[: 1 + distributed.get_rank()]
    return model


def _pipeline_module() -> nn.Module:
    deepspeed_on_cpu()
    from deepspeed.pipe import PipelineModule

    class Pipeline(PipelineModule):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.model, self.lm_head = build("qwen2_moe").model, nn.Linear(24, 384)

    return Pipeline()


def _auto_tensor_parallel() -> nn.Module:
    """As DeepSpeed's AutoTP replaces linear maps."""
    deepspeed_on_cpu().init_distributed("gloo")
    from deepspeed.module_inject.layers import LinearLayer

    model = build("qwen2_moe")
    for layer in model.model.layers:
        layer.self_attn.q_proj = LinearLayer(layer.self_attn.q_proj, distributed.group.WORLD)
    return model


def _own_weights() -> nn.Module:
    """Each process trains a model of its own."""
    return build("qwen2_moe", seed=distributed.get_rank())


def _other_samples() -> ProbeSet:
    return ProbeSet({"a": make_samples(distributed.get_rank())})


def _from_pretrained(family: str, **config: Any) -> nn.Module:
    import tempfile

    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    tell_environment()
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        distributed.broadcast_object_list(shared)
        if own == shared[0]:
            build(family).save_pretrained(own)
        distributed.barrier()
        model = AutoModelForCausalLM.from_pretrained(
            shared[0], dtype=torch.float32, distributed_config=DistributedConfig(**config)
        )
        distributed.barrier()
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tensor-parallel experts": _tensor_parallel_experts,
    "tensor-parallel attention": _tensor_parallel_attention,
    "AutoTP": _auto_tensor_parallel,
    "stages": _stages,
    "PipelineModule": _pipeline_module,
    "own weights": _own_weights,
    "other samples": lambda: build("qwen2_moe"),
}
PROBE_SETS: dict[str, Callable[[], ProbeSet]] = {"other samples": _other_samples}

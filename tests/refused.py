"""Models that are divided among processes in ways that cannot be probed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from backend_training import SETTINGS, many, one
from backends import BACKENDS, deepspeed_on_cpu, language_loss, tell_environment
from mui_callback import MUICallback, MUIProbe, ProbeSet
from mui_callback.errors import MUIError, ProbeError
from mui_callback.experts.tail import Tail
from mui_callback.trainers.base import Training
from tiny import build
from tiny_samples import make_samples


def refusal(rank: int, directory: Path, *, kind: str) -> str:
    """What a process is told."""
    try:
        report = MUIProbe(MODELS[kind](), PROBE_SETS.get(kind, many)(), **SETTINGS).measure()
    except MUIError as error:
        return f"{type(error).__name__}: {error}"
    return f"{report.n_samples} samples, {report.pooled.loss}"


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


def _tensor_parallel_attention_and_fsdp() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = build("qwen2_moe")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    plan = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
    for layer in model.model.layers:
        parallelize_module(layer.self_attn, mesh["model"], {**plan, "o_proj": RowwiseParallel()})
        fully_shard(layer, mesh=mesh["data"])
    return fully_shard(model, mesh=mesh["data"])


def _tensor_parallel_shared_experts() -> nn.Module:
    return _from_pretrained("deepseek_v3", ep_size=2, tp_size=2, ep_implementation="all_reduce")


def _two_models() -> nn.Module:
    """Two processes train one, and two another."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("models", "data"))
    return fully_shard(build("qwen2_moe", seed=distributed.get_rank() // 2), mesh=mesh["data"])


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


def _sequence_parallel() -> nn.Module:
    deepspeed_on_cpu().init_distributed("gloo")
    from deepspeed.runtime.sequence_parallel.parallel_state_sp import initialize_sequence_parallel

    initialize_sequence_parallel(2)
    return build("qwen2_moe")


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
    "tensor-parallel attention and FSDP2": _tensor_parallel_attention_and_fsdp,
    "tensor-parallel shared experts": _tensor_parallel_shared_experts,
    "two models": _two_models,
    "AutoTP": _auto_tensor_parallel,
    "sequences": _sequence_parallel,
    "stages": _stages,
    "PipelineModule": _pipeline_module,
    "own weights": _own_weights,
    "other samples": lambda: build("qwen2_moe"),
}
PROBE_SETS: dict[str, Callable[[], ProbeSet]] = {"other samples": _other_samples}


def train_apart(rank: int, directory: Path) -> list[str]:
    """Losses of a probe where processes begin with the same weights and train on without each other."""
    model = build("qwen2_moe")
    probe = MUIProbe(model, many(), **SETTINGS)
    losses = [str(probe.measure().pooled.loss)]
    with torch.no_grad():
        model.lm_head.weight += rank
    return [*losses, str(probe.measure().pooled.loss), str(MUIProbe(model, many(), **SETTINGS).measure().pooled.loss)]


def probe_a_part_first(rank: int, directory: Path) -> float:
    """The loss of a model after a callback has probed a part of it before its first forward."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = build("qwen2_moe")

        def forward(self, input_ids: torch.Tensor) -> Any:
            return self.student(input_ids)

    mesh, whole = init_device_mesh("cpu", (2,)), Whole()
    fully_shard(whole.student, mesh=mesh)
    fully_shard(whole, mesh=mesh)
    training = Training(whole, 0, directory, [], tokenizer=None, eval_data=lambda n: None, state=None)
    MUICallback(many())._make_probe(training).measure()
    tokens = torch.arange(3, 27).view(2, 12)
    loss = language_loss(whole(tokens), tokens)
    loss.backward()
    return loss.item()


def alone(rank: int) -> str:
    """The last of them, in one process."""
    model = build("qwen2_moe")
    with torch.no_grad():
        model.lm_head.weight += rank
    return str(MUIProbe(model, many(), **SETTINGS).measure().pooled.loss)


def probe_sharded_later(rank: int, directory: Path) -> float | None:
    """The loss of a probe that was made before the model was spread, of fewer samples than processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = build("qwen2_moe")
    probe = MUIProbe(model, one(), **SETTINGS)
    before = probe.measure().pooled.loss
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    after = probe.measure().pooled.loss
    assert before is not None
    return after - before if after is not None else None


def fail_in_the_transpose(rank: int, directory: Path, *, is_of_the_model: bool) -> str:
    """What a process is told if something fails where those that share experts exchange tensors.

    Args:
        rank: this process.
        directory: of the launch.
        is_of_the_model: whether the layer cannot be read, in all processes; else memory runs out in one.
    """
    trainee = BACKENDS["moe_k2"].build()
    probe = MUIProbe(trainee.model, many(), **SETTINGS)
    if is_of_the_model:
        Tail.transpose = _cannot_be_transposed
    elif rank == 1:
        Tail.transpose = _run_out_of_memory
    try:
        probe.measure()
    except MUIError as error:
        return f"{type(error).__name__}: {error}"
    return "measured"


def _cannot_be_transposed(*args: Any, **options: Any) -> None:
    raise ProbeError("not linear")


def _run_out_of_memory(*args: Any, **options: Any) -> None:
    raise MemoryError("no memory")

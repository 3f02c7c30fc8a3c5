"""Checkpoints that trainers write over two processes, and for each the weights that it is of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from backends import (
    BACKENDS,
    ODD_QWEN,
    ODD_VOCAB,
    WIDTH,
    D,
    Mixture,
    Trainee,
    build_deepspeed,
    build_deepspeed_moe,
    deepspeed_on_cpu,
    language_loss,
    tell_environment,
)
from plain_moe import GatedMLP, PlainLM, build_plain
from tiny import VOCAB, build

Weights = dict[str, Tensor]
MIXTURE = Mixture(2)
TAG = "global_step1"


# Functions that a user would name for models that are not of transformers


def plain_model() -> nn.Module:
    return build_plain("qwen2")


def moe_model() -> nn.Module:
    """With MoE layers of DeepSpeed, which need a process group: here one of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    deepspeed = deepspeed_on_cpu()
    deepspeed.init_distributed("gloo")
    layer = partial(deepspeed.moe.layer.MoE, D, num_experts=MIXTURE.n_experts, k=MIXTURE.k)
    model = PlainLM(lambda n: layer(GatedMLP(D, WIDTH)) if n else GatedMLP(D, 40), block_name="moe")
    for module in model.modules():
        if isinstance(module, deepspeed.moe.layer.MoE):
            module.set_deepspeed_parallelism()
    return model


# Writing them


def write_all(rank: int, directory: Path) -> dict[str, Weights]:
    """One below the other, a directory each; what this process has of the weights, by name of the directory."""
    tell_environment()
    written = {}
    for name, write in WRITERS.items():
        torch.manual_seed(0)
        written[name] = write(directory / name)
        distributed.barrier()
    return written


def tokens() -> Tensor:
    return torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))


def _engine(directory: Path, *, build: Callable[..., Trainee], **options: Any) -> Weights:
    trainee = build(**options)
    trainee.train_step(tokens())
    engine: Any = trainee.model
    engine.save_checkpoint(str(directory), tag=TAG)
    return _gathered(engine.module)


def _gathered(module: nn.Module) -> Weights:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def _frozen_in_part() -> nn.Module:
    model = ODD_QWEN()
    model.get_input_embeddings().requires_grad_(False)
    return model


def _tied() -> nn.Module:
    return build("qwen2_moe", vocab_size=ODD_VOCAB, tie_word_embeddings=True)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _lightning_shards(directory: Path) -> Weights:
    import lightning
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard
    from torch.utils.data import DataLoader

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model: Any = None

        def configure_model(self) -> None:
            if self.model is None:
                self.model = ODD_QWEN()
                fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch: Tensor) -> Tensor:
            return language_loss(self.model(batch), batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    module = Module()
    trainer = lightning.Trainer(
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"),
        plugins=[TorchElasticEnvironment()],
        accelerator="cpu",
        devices=2,
        max_steps=1,
        default_root_dir=directory,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader([*tokens()], batch_size=1))
    trainer.save_checkpoint(directory / "step=1.ckpt")
    return {name: weight.full_tensor().detach().clone() for name, weight in module.model.state_dict().items()}


def _hf_trainer(directory: Path, *, is_gathered: bool) -> Weights:
    from transformers import Trainer, TrainingArguments

    model = ODD_QWEN().train()  # whole: where a config of ZeRO-3 is known, transformers makes parts of models
    deepspeed_on_cpu().init_distributed("gloo")
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": is_gathered,
    }
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto"}
    config |= {"zero_optimization": zero, "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}}
    args = TrainingArguments(
        str(directory), deepspeed=config, use_cpu=True, max_steps=1, save_steps=1, report_to=[], disable_tqdm=True
    )
    trainer = Trainer(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in tokens()])
    trainer.train()
    return _gathered(trainer.model_wrapped.module)


_HF = partial(build_deepspeed, ODD_QWEN)
_PLAIN = partial(build_deepspeed, plain_model)
_FROZEN = partial(build_deepspeed, _frozen_in_part, parameters=_trained)
_IN_GROUPS = {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 2000}
WRITERS: dict[str, Callable[[Path], Weights]] = {
    **{f"zero{stage}": partial(_engine, build=_HF, stage=stage) for stage in range(4)},
    "zero3_tied": partial(_engine, build=partial(build_deepspeed, _tied), stage=3),
    "zero3_groups": partial(_engine, build=_HF, stage=3, zero_optimization=_IN_GROUPS),
    "zero3_frozen": partial(_engine, build=_FROZEN, stage=3),
    "plain_zero2_bf16": partial(_engine, build=_PLAIN, stage=2, bf16={"enabled": True}),
    "plain_zero3": partial(_engine, build=_PLAIN, stage=3, leaf="mlp"),
    "moe": partial(_engine, build=partial(build_deepspeed_moe, MIXTURE), ep_size=2, stage=1),
    "autoep": partial(_engine, build=BACKENDS["autoep_olmoe"].build),
    "autoep_zero3": partial(_engine, build=BACKENDS["autoep_zero3"].build),
    "lightning_shards": _lightning_shards,
    "trainer_zero3": partial(_hf_trainer, is_gathered=False),
    "trainer_zero3_gathered": partial(_hf_trainer, is_gathered=True),
}

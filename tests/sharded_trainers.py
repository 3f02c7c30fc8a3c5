"""What each process does in the tests of trainers that spread a model over processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader

from backend_training import SETTINGS, many
from backends import ODD_QWEN, deepspeed_on_cpu, language_loss, tell_environment
from distributed_training import output_dir
from mui_callback import MemorySink, MUICallback, MUIMonitor
from tiny import VOCAB

N_STEPS = 3
Seen = dict[str, Any]


def train(rank: int, directory: Path, *, trainer: str, is_probed: bool = True) -> Seen:
    """Train for some steps: the losses of this process, and its points."""
    tell_environment()
    torch.manual_seed(0)
    sink = MemorySink()
    losses = TRAINERS[trainer](output_dir(directory, rank), sink, is_probed)
    return {"losses": losses, "points": sink.points}


def _rows() -> list[Tensor]:
    tokens = torch.randint(3, VOCAB, (4 * N_STEPS, 12), generator=torch.Generator().manual_seed(1))
    return list(tokens)


def _shard(model: Any, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def in_lightning(directory: Path, sink: MemorySink, is_probed: bool) -> list[float]:
    """`ModelParallelStrategy`, with `fully_shard` in `configure_model`."""
    import lightning
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import ModelParallelStrategy

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model: Any = None
            self.losses: list[float] = []

        def configure_model(self) -> None:
            if self.model is None:
                self.model = ODD_QWEN()
                _shard(self.model, self.device_mesh["data_parallel"])

        def training_step(self, batch: Tensor) -> Tensor:
            loss = language_loss(self.model(batch), batch)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    module = Module()
    lightning.Trainer(
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"),
        plugins=[TorchElasticEnvironment()],
        accelerator="cpu",
        devices=distributed.get_world_size(),
        max_steps=N_STEPS,
        callbacks=[_callback(sink)] if is_probed else [],
        default_root_dir=directory,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, DataLoader(_rows(), batch_size=2))
    return module.losses


def in_transformers(directory: Path, sink: MemorySink, is_probed: bool) -> list[float]:
    """`Trainer(deepspeed=…)`."""
    from transformers import Trainer, TrainingArguments

    model = ODD_QWEN().train()  # whole: where a config of ZeRO-3 is known, transformers makes parts of models
    deepspeed_on_cpu().init_distributed("gloo")
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    config = {"train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto", "zero_optimization": zero}
    config["optimizer"] = {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}
    args = TrainingArguments(
        output_dir=str(directory),
        deepspeed=config,
        use_cpu=True,
        max_steps=N_STEPS,
        per_device_train_batch_size=2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
    )
    data = [{"input_ids": row, "labels": row} for row in _rows()]
    callbacks = [_callback(sink)] if is_probed else []
    trainer = Trainer(model, args, train_dataset=data, callbacks=callbacks)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def in_accelerate(directory: Path, sink: MemorySink, is_probed: bool) -> list[float]:
    """A loop with FSDP2 by `accelerate`."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Qwen2MoeDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model: nn.Module = ODD_QWEN().train()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    monitor = MUIMonitor(model, many(), every=1, sinks=[sink], output_dir=directory, **SETTINGS) if is_probed else None
    losses = []
    for step, batch in enumerate(torch.stack(_rows()).split(4), start=1):
        loss = language_loss(model(batch), batch)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if monitor is not None:
            monitor.step(step)
    if monitor is not None:
        monitor.close()
    return losses


def _callback(sink: MemorySink) -> MUICallback:
    return MUICallback(many(), every=1, sinks=[sink], **SETTINGS)


TRAINERS: dict[str, Callable[[Path, MemorySink, bool], list[float]]] = {
    "lightning": in_lightning,
    "transformers": in_transformers,
    "accelerate": in_accelerate,
}

"""A real Trainer on a tiny MoE with dropout, and what is left when it has trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from tiny import build, qwen2_moe

STEPS = 8


def rows(n: int = 40, length: int = 18, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 380, (length,), generator=generator) for _ in range(n)]
    return [{"input_ids": x, "labels": x.clone()} for x in ids]


@dataclass
class Trained:
    weights: dict[str, torch.Tensor]
    optimizer: list[torch.Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    random: torch.Tensor | None = None


def make_trainer(output_dir: Path, callbacks: list[TrainerCallback], *, trainer: Any = None, **options: Any) -> Trainer:
    torch.manual_seed(1)
    arguments: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return Trainer(
        model=build(qwen2_moe(attention_dropout=0.2)),
        args=TrainingArguments(output_dir=str(output_dir), **{**arguments, **options}),
        train_dataset=rows(),
        callbacks=callbacks,
        **(trainer or {}),
    )


def train(output_dir: Path, callbacks: list[TrainerCallback], **options: Any) -> Trained:
    trainer = make_trainer(output_dir, callbacks, **options)
    trainer.train()
    state = trainer.optimizer.state_dict()["state"].values()
    return Trained(
        weights={name: p.detach().clone() for name, p in trainer.model.named_parameters()},
        optimizer=[value for entry in state for value in entry.values()],
        losses=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        random=torch.get_rng_state(),
    )


def assert_same_to_the_bit(first: Trained, second: Trained) -> None:
    assert first.losses == second.losses
    assert len(first.losses) > 1
    assert first.weights.keys() == second.weights.keys()
    for name, weight in first.weights.items():
        assert torch.equal(weight, second.weights[name]), name
    assert len(first.optimizer) == len(second.optimizer) > 0
    for a, b in zip(first.optimizer, second.optimizer, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(first.random, second.random)

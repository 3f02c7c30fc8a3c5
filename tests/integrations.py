"""The ways in which people train, each a real one: the same model, data and steps in all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from mui_callback import MemorySink, MUICallback, MUIMonitor, ProbeSet
from tiny import build, qwen2_moe
from tiny_samples import make_samples
from training import STEPS, Trained, make_trainer, rows

OnStep = Callable[[int], None]


def probe_set() -> ProbeSet:
    return ProbeSet({"a": make_samples(7), "b": make_samples(8)})


def make_model() -> nn.Module:
    return build(qwen2_moe(attention_dropout=0.2))


@dataclass
class Watch:
    """How a training is probed; one object may watch several, one after the other."""

    options: dict[str, Any] = field(default_factory=dict)
    memory: MemorySink = field(default_factory=MemorySink)
    monitors: list[MUIMonitor] = field(default_factory=list)
    tracker: Any = None

    def __post_init__(self) -> None:
        self.options = {"every": 3, "on_error": "raise", "sinks": [self.memory], **self.options}
        self.callback = MUICallback(probe_set(), **self.options)

    def monitor(self, model: nn.Module, output_dir: Path) -> MUIMonitor:
        monitor = MUIMonitor(model, probe_set(), output_dir=output_dir, tracker=self.tracker, **self.options)
        self.monitors.append(monitor)
        return monitor

    def close(self) -> None:
        """Once more than the training did."""
        self.callback._end()
        for monitor in self.monitors:
            monitor.close()

    @property
    def steps(self) -> list[int]:
        return [point.step for point in self.memory.points]


class Integration(ABC):
    """One way to train."""

    name: str

    @abstractmethod
    def fit(
        self, output_dir: Path, watch: Watch | None, model: nn.Module | None = None, on_step: OnStep | None = None
    ) -> Trained:
        """Train for `STEPS` steps; `on_step` is called before each with the number of those done."""


class HFTrainer(Integration):
    name = "transformers"

    def fit(
        self, output_dir: Path, watch: Watch | None, model: nn.Module | None = None, on_step: OnStep | None = None
    ) -> Trained:
        class Before(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if on_step is not None:
                    on_step(state.global_step)

        trainer = self.make(output_dir, [Before(), *([watch.callback] if watch else [])], model or make_model())
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return trained(trainer.model, trainer.optimizer, losses)

    def make(self, output_dir: Path, callbacks: list[TrainerCallback], model: nn.Module) -> Any:
        trainer = make_trainer(output_dir, callbacks)
        trainer.model = trainer.model_wrapped = model
        return trainer


class SFTTrainer(HFTrainer):
    name = "trl"

    def make(self, output_dir: Path, callbacks: list[TrainerCallback], model: nn.Module) -> Any:
        import trl
        from datasets import Dataset
        from transformers import ByT5Tokenizer

        torch.manual_seed(1)
        arguments = trl.SFTConfig(
            output_dir=str(output_dir),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            logging_steps=1,
            learning_rate=1e-2,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            seed=3,
        )
        return trl.SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows()]),
            processing_class=ByT5Tokenizer(),
            callbacks=callbacks,
        )


class Lightning(Integration):
    def __init__(self, name: str, **options: Any) -> None:
        self.name = name
        self.options = {"accelerator": "cpu", **options}

    def fit(
        self, output_dir: Path, watch: Watch | None, model: nn.Module | None = None, on_step: OnStep | None = None
    ) -> Trained:
        import importlib

        pl = importlib.import_module(self.name)
        losses: list[float] = []
        net = model or make_model()

        class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.net = net

            def training_step(self, batch: Any, index: int) -> torch.Tensor:
                if on_step is not None:
                    on_step(self.trainer.global_step)
                loss = self.net(**batch).loss
                losses.append(loss.item())
                return loss

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.AdamW(self.parameters(), lr=1e-2)

        torch.manual_seed(1)
        module = Module()
        module.train()
        trainer = pl.Trainer(
            max_steps=STEPS,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=output_dir,
            callbacks=[watch.callback] if watch else [],
            **self.options,
        )
        trainer.fit(module, DataLoader(rows(), batch_size=4, shuffle=True))
        return trained(module.net, trainer.optimizers[0], losses)


class Loop(Integration):
    """A training loop of the user's own."""

    def __init__(self, name: str) -> None:
        self.name = name

    def fit(
        self, output_dir: Path, watch: Watch | None, model: nn.Module | None = None, on_step: OnStep | None = None
    ) -> Trained:
        model = model or make_model()
        torch.manual_seed(1)
        loader, losses = DataLoader(rows(), batch_size=4, shuffle=True), []
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
        backward = torch.Tensor.backward
        if self.name == "accelerate":
            from accelerate import Accelerator

            accelerator = Accelerator(cpu=True)
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
            backward = accelerator.backward
        model.train()
        with watch.monitor(model, output_dir) if watch else nullcontext() as monitor:
            for step, batch in zip(range(STEPS), loader, strict=False):
                if on_step is not None:
                    on_step(step)
                loss = model(**batch).loss
                backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
                if monitor is not None:
                    monitor.step(step + 1)
        return trained(model, getattr(optimizer, "optimizer", optimizer), losses)


INTEGRATIONS: dict[str, Integration] = {
    integration.name: integration
    for integration in (
        HFTrainer(),
        SFTTrainer(),
        Lightning("lightning.pytorch"),
        Lightning("pytorch_lightning"),
        Loop("accelerate"),
        Loop("torch"),
    )
}


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, losses: list[float]) -> Trained:
    return Trained(
        weights={name: p.detach().clone() for name, p in model.named_parameters()},
        optimizer=[value for entry in optimizer.state_dict()["state"].values() for value in entry.values()],
        losses=losses,
        random=torch.get_rng_state(),
    )


@contextmanager
def raising_in_a_probe(model: nn.Module, error: BaseException, at_call: int = 1) -> Iterator[None]:
    """In the second MoE layer, in the middle of a pass."""
    calls = {"n": 0}

    def fail(module: nn.Module, args: Any) -> None:
        if not module.training:  # in a probe, that is
            calls["n"] += 1
            if calls["n"] == at_call:
                torch.rand(3)
                raise error

    handle = model.model.layers[1].mlp.experts.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def failing(at: int, error: BaseException) -> OnStep:
    """Raise in the training itself, before the step that is the next after `at`."""

    def on_step(step: int) -> None:
        if step == at:
            raise error

    return on_step

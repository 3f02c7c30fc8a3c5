"""Training with the callback is training without it, to the bit: weights, optimizer, losses, random state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mui_callback import MUICallback, ProbeSet
from mui_callback.sinks.memory import MemorySink
from tiny_samples import make_samples
from training import STEPS, assert_same_to_the_bit, make_trainer, train

SETTINGS: dict[str, dict[str, Any]] = {
    "dropout": {},
    "gradient accumulation": {"gradient_accumulation_steps": 3},
    "bf16 autocast": {"bf16": True},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 3, "trainer": {"eval_dataset": []}},
}


def probe_set() -> ProbeSet:
    return ProbeSet({"a": make_samples(7), "b": make_samples(8)})


@pytest.mark.parametrize("setting", list(SETTINGS))
def test_training_is_the_same_to_the_bit(setting: str, tmp_path: Path) -> None:
    options = SETTINGS[setting]
    if "trainer" in options:
        from training import rows

        options = {**options, "trainer": {"eval_dataset": rows(8, seed=9)}}
    without = train(tmp_path / "without", [], **options)
    memory = MemorySink()
    callback = MUICallback(probe_set(), every=2, sinks=[memory], on_error="raise")
    with_callback = train(tmp_path / "with", [callback], **options)
    assert_same_to_the_bit(without, with_callback)
    assert [point.step for point in memory.points] == list(range(0, STEPS + 1, 2))
    assert all(point.report is not None for point in memory.points)
    assert memory.closed


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    """A callback that draws one random number is seen."""

    class Careless(MUICallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            super().on_step_end(*args, **kwargs)
            torch.rand(1)

    without = train(tmp_path / "without", [])
    careless = train(tmp_path / "with", [Careless(probe_set(), every=2)])
    with pytest.raises(AssertionError):
        assert_same_to_the_bit(without, careless)


@pytest.mark.parametrize("call", [1, 3])
def test_a_probe_that_raises_in_the_middle_changes_nothing(call: int, tmp_path: Path) -> None:
    """The second layer's experts fail during a probe: in the second batch of it, say, or in the first."""
    without = train(tmp_path / "without", [])
    memory = MemorySink()
    trainer = make_trainer(tmp_path / "with", [MUICallback(probe_set(), every=2, batch_tokens=30, sinks=[memory])])
    calls = {"n": 0}

    def fail(module: torch.nn.Module, args: Any) -> None:
        if not module.training:  # in a probe, that is
            calls["n"] += 1
            if calls["n"] == call:
                np.random.rand()  # noqa: NPY002
                raise RuntimeError("injected")

    trainer.model.model.layers[1].mlp.experts.register_forward_pre_hook(fail)
    with pytest.warns(UserWarning, match=r"MUI probe at step 0 failed; training goes on\. RuntimeError: injected"):
        trainer.train()
    assert [point.error is not None for point in memory.points] == [True, False, False, False, False]
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, without.weights[name]), name
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == without.losses


@pytest.mark.parametrize("compiled", ["by the Trainer", "forward", "layers"])
def test_a_compiled_model_is_not_compiled_again(compiled: str, tmp_path: Path) -> None:
    def frames(callbacks: list[Any], directory: Path) -> int:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        by_trainer = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled == "by the Trainer" else {}
        trainer = make_trainer(directory, callbacks, **by_trainer)
        model = trainer.model
        if compiled == "forward":
            model.forward = torch.compile(model.forward, backend="eager")
        if compiled == "layers":
            for index, layer in enumerate(model.model.layers):
                model.model.layers[index] = torch.compile(layer, backend="eager")
        trainer.train()
        return sum(torch._dynamo.utils.counters["frames"].values())

    without = frames([], tmp_path / "without")
    assert without > 0
    assert frames([MUICallback(probe_set(), every=2)], tmp_path / "with") == without

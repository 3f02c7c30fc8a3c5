"""The causal check at the end of a training: on the last weights, once, and failing without harm."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from asked import Loop, merged, steps_done
from integrations import make_model, probe_set
from mui_callback import MemorySink, MUICallback, MUIProbe
from mui_callback.probe.ablation import ablate
from training import make_trainer

NAMES = [one + end for one in ("key", "random") for end in ("", "_low", "_high")]
KEYS = {f"mui/{task}/ablation/{name}" for task in "ab" for name in NAMES}


def ablated(scalars: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in scalars.items() if "/ablation/" in name}


@pytest.mark.parametrize("what", ["neurons", "experts", True])
@pytest.mark.parametrize("n_steps", [3, 4])
def test_it_is_of_the_last_weights_and_of_their_report(n_steps: int, what: Any, tmp_path: Path) -> None:
    """Whether the last step had a point before the end was known, as every second one does here, or not."""
    loop = Loop(tmp_path, ablate=what).train(range(1, n_steps + 1))
    assert not any(ablated(point.scalars) for point in loop.memory.points)
    loop.monitor.close()
    loop.monitor.close()
    assert loop.steps == ([0, 2, 3] if n_steps == 3 else [0, 2, 4, 4])
    probe = MUIProbe(loop.model, probe_set(), rules="top_fraction=0.05")
    expected = ablate(probe, probe.measure(), what="neurons" if what is True else what)
    last = loop.memory.points[-1]
    assert last.ablation == expected
    found = ablated(merged(loop.memory)[n_steps])
    for task in "ab":
        changes = expected.tasks[task].changes
        for name, change in (("key", changes.key), ("random", changes.random)):
            assert found[f"mui/{task}/ablation/{name}"] == change.value
            if change.interval is not None:
                ends = (found[f"mui/{task}/ablation/{name}_{end}"] for end in ("low", "high"))
                assert tuple(ends) == (change.interval.low, change.interval.high)
    assert found.keys() <= KEYS
    assert what == "experts" or found.keys() == KEYS
    line = json.loads((tmp_path / "mui.jsonl").read_text().splitlines()[-1])
    assert line["ablation"]["what"] == expected.what
    assert line["ablation"]["tasks"]["b"]["n_key"] == expected.tasks["b"].n_key
    assert line["ablation"]["tasks"]["b"]["changes"]["loss"] == expected.tasks["b"].changes.loss


def test_the_last_step_is_probed_for_it(tmp_path: Path) -> None:
    loop = Loop(tmp_path, every=None, at_start=False, at_end=False, ablate=True).train([1, 2])
    loop.monitor.close()
    assert loop.steps == [2]
    assert loop.memory.points[-1].ablation is not None


def test_after_an_exception_there_is_none(tmp_path: Path) -> None:
    loop = Loop(tmp_path, ablate=True).train([1, 2])
    with pytest.raises(RuntimeError, match="mine"), loop.monitor:
        raise RuntimeError("mine")
    assert loop.steps == [0, 2]


def test_a_trainer_that_stops_early_is_checked_at_its_end(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 3

    memory = MemorySink()
    callback = MUICallback(probe_set(), every=3, sinks=[memory], on_error="raise", ablate=True)
    make_trainer(tmp_path, [callback, Stop()]).train()
    assert [point.step for point in memory.points if point.ablation] == [3]


@pytest.mark.parametrize("n_steps", [2, 3])
def test_its_time_is_time_in_probes_but_tells_nothing_of_the_next(n_steps: int, tmp_path: Path) -> None:
    model, probed = make_model(), []

    def after_the_last_probe(model: nn.Module, step: int) -> dict[str, float]:
        probed.append(step)
        return steps_done(model, step)

    def linger(module: nn.Module, args: Any) -> None:
        if n_steps in probed and not module.training:
            time.sleep(0.05)

    model.model.layers[1].mlp.experts.register_forward_pre_hook(linger)
    loop = Loop(tmp_path, model=model, ablate=True, benchmarks=after_the_last_probe).train(range(1, n_steps + 1))
    loop.monitor.close()
    spent = loop.monitor._run._pace.spent
    assert spent.probing > 0.5 > spent.last_probe  # two tasks are run five times each


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_a_failure_harms_nothing(on_error: str, tmp_path: Path) -> None:
    model, probed = make_model(), []

    def after_the_last_probe(model: nn.Module, step: int) -> dict[str, float]:
        probed.append(step)
        return steps_done(model, step)

    def fail(module: nn.Module, args: Any) -> None:
        if 3 in probed and not module.training:
            torch.rand(3)
            raise RuntimeError("injected")

    model.model.layers[1].mlp.experts.register_forward_pre_hook(fail)
    loop = Loop(tmp_path, model=model, ablate=True, benchmarks=after_the_last_probe, on_error=on_error).train([1, 2, 3])
    before = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    raised = pytest.raises(RuntimeError, match="injected") if on_error == "raise" else nullcontext()
    with pytest.warns(UserWarning, match="step 3: the ablation of key neurons failed; .*injected"), raised:
        loop.monitor.close()
    assert torch.equal(before[0], torch.get_rng_state())
    assert all(torch.equal(value, before[1][name]) for name, value in model.state_dict().items())
    last = loop.memory.points[-1]
    assert last.step == 3
    assert last.ablation is None
    assert last.scalars.keys() >= {"mui/mui", "mui/benchmark/a"}
    assert last.failures == {"ablation": "RuntimeError: injected"}
    assert model.training


def test_it_leaves_no_trace(tmp_path: Path) -> None:
    """A training that goes on after the monitor is closed."""
    plain, checked = (Loop(tmp_path / name, ablate=what) for name, what in (("plain", False), ("checked", "neurons")))
    for loop in (plain, checked):
        loop.train([1, 2, 3])
        loop.monitor.close()
        loop.train([4, 5])
    for (name, one), other in zip(plain.model.named_parameters(), checked.model.parameters(), strict=True):
        assert torch.equal(one, other), name

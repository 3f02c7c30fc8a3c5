"""Benchmarks in a training: at the step of a probe, at their own interval, and failing without harm."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import ByT5Tokenizer

from asked import Loop, loss_of_four, steps_done
from distributed_training import Seen, fail_at, launch, moe_model, output_dir, record, train
from mui_callback import MemorySink, MUICallback
from mui_callback.benchmarks.given import as_benchmarks
from mui_callback.benchmarks.run import run_benchmarks
from mui_callback.errors import ProbeSetError
from test_benchmarks import choices_file
from test_lm_eval import tasks
from training import STEPS, assert_same_to_the_bit, make_trainer


def steps_with(loop: Loop, key: str) -> list[int]:
    return [point.step for point in loop.memory.points if key in point.scalars]


def rows_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "mui.jsonl").read_text().splitlines()][1:]


class Failing:
    """Raises at these steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps
        self.called: list[int] = []

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        self.called.append(step)
        if step in self.steps:
            raise RuntimeError("injected")
        return {"fine": 1.0}


def said(loop_options: dict[str, Any], directory: Path, steps: range = range(1, 9)) -> tuple[Loop, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop = Loop(directory, **loop_options).train(steps)
    return loop, [str(w.message) for w in caught if "MUI" in str(w.message)]


# Where they are logged


def test_results_are_of_the_live_model_and_beside_the_probe(tmp_path: Path) -> None:
    path = choices_file(tmp_path)
    loop = Loop(tmp_path, benchmarks=[loss_of_four, path], tokenizer=ByT5Tokenizer()).train(range(1, 5))
    assert loop.steps == [0, 2, 4]
    now, failures = run_benchmarks(as_benchmarks([loss_of_four, path], ByT5Tokenizer()), loop.model, 4)
    assert failures == []
    last = loop.memory.points[-1]
    assert {name: point.value for name, point in last.benchmarks.items()} == {
        name: point.value for name, point in now.items()
    }
    for name, point in now.items():
        assert last.scalars[f"mui/benchmark/{name}"] == point.value
        assert last.scalars[f"mui/benchmark/{name}_stderr"] == point.standard_error
    assert "mui/mui" in last.scalars
    losses = [point.scalars["mui/benchmark/loss"] for point in loop.memory.points]
    assert len(set(losses)) == 3  # it is the model that trains
    for line, point in zip(rows_of(tmp_path), loop.memory.points, strict=True):
        assert line["scalars"] == point.scalars


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="pip install 'mui-callback[lm-eval]'")
def test_tasks_of_the_harness_are_run_in_a_training(tmp_path: Path) -> None:
    given = {"a": tasks(tmp_path)["choose"]}
    loop = Loop(tmp_path, benchmarks=given, tokenizer=ByT5Tokenizer(), phase_window=3).train(range(1, 3))
    scored = [name for name in loop.memory.points[-1].scalars if name.startswith("mui/benchmark/a/acc")]
    assert {"mui/benchmark/a/acc", "mui/benchmark/a/acc_norm"} <= set(scored)
    assert loop.memory.points[-1].phases["a"].point.axis == "benchmark/a/acc_norm"


def test_the_tokenizer_of_the_trainer_is_that_of_the_benchmarks(tmp_path: Path) -> None:
    memory = MemorySink()
    callback = MUICallback(
        every=None, at_end=False, benchmarks=choices_file(tmp_path), sinks=[memory], on_error="raise"
    )
    trainer = {"processing_class": ByT5Tokenizer()}
    make_trainer(tmp_path, [callback], max_steps=1, trainer=trainer).train()
    assert "mui/benchmark/numbers/accuracy" in memory.points[0].scalars


# When


def test_an_interval_of_their_own_makes_a_probe_each_time(tmp_path: Path) -> None:
    loop = Loop(tmp_path, benchmarks=steps_done, benchmarks_every=5).train(range(1, 12))
    assert loop.steps == [0, 2, 4, 5, 6, 8, 10]
    assert steps_with(loop, "mui/benchmark/a") == [0, 5, 10]
    loop.monitor.close()
    assert loop.steps[-1] == 11
    assert steps_with(loop, "mui/benchmark/a") == [0, 5, 10, 11]
    assert all("mui/mui" in point.scalars for point in loop.memory.points)


def test_at_the_last_step_they_come_later_if_it_was_probed_without_them(tmp_path: Path) -> None:
    loop = Loop(tmp_path, benchmarks=steps_done, benchmarks_every=5, phase_window=3).train(range(1, 9))
    loop.monitor.close()
    loop.monitor.close()
    assert loop.steps == [0, 2, 4, 5, 6, 8, 8]
    more = loop.memory.points[-1]
    assert more.report is more.error is None
    assert more.scalars == {"mui/benchmark/a": 8.0, "mui/a/phase": more.phases["a"].call.phase.code}
    assert more.phases["a"].call.first_step == 0  # from steps 0, 5 and 8
    assert repr(more) == "ProbePoint(step=8, mui/benchmark/a, mui/a/phase)"
    assert rows_of(tmp_path)[-1]["scalars"] == more.scalars
    assert "mui/benchmark/a" not in loop.memory.points[-2].scalars
    _, points = loop.monitor.state_dict()["history"]["points"][-1]
    assert points == loop.memory.points[-2].scalars | more.scalars
    # and the record is read back as one point
    again = Loop(tmp_path, start_step=8, benchmarks=steps_done)
    assert again.monitor.state_dict()["history"]["points"][-1] == [8, points]


def test_no_last_one_where_there_is_to_be_none(tmp_path: Path) -> None:
    loop = Loop(tmp_path, benchmarks=steps_done, benchmarks_every=5, at_start=False, at_end=False).train(range(1, 9))
    loop.monitor.close()
    assert steps_with(loop, "mui/benchmark/a") == [5]


def sleepy(model: nn.Module, step: int) -> dict[str, float]:
    time.sleep(0.4)
    return {"slept": 0.4}


@pytest.mark.parametrize("every", ["probe", 2])
def test_their_time_is_time_in_probes(every: Any, tmp_path: Path) -> None:
    spent = Loop(tmp_path, benchmarks=sleepy, benchmarks_every=every).train(range(1, 3)).monitor._run._pace.spent
    assert spent.probing > 0.8
    assert spent.overhead == spent.probing / spent.training
    # what the next probe takes is what decides when "auto" can afford it
    assert (spent.last_probe > 0.4) == (every == "probe")


# What goes wrong


def test_a_failure_is_said_recorded_and_harms_no_other(tmp_path: Path) -> None:
    loop, messages = said({"benchmarks": [Failing(2), steps_done]}, tmp_path)
    assert messages == ["MUI at step 2: benchmark 'Failing': RuntimeError: injected. Training goes on."]
    assert steps_with(loop, "mui/benchmark/fine") == [0, 4, 6, 8]
    assert steps_with(loop, "mui/benchmark/a") == steps_with(loop, "mui/mui") == [0, 2, 4, 6, 8]
    failures = [point.failures for point in loop.memory.points]
    assert failures == [{}, {"benchmark Failing": "RuntimeError: injected"}, {}, {}, {}]
    assert [line.get("failures", {}) for line in rows_of(tmp_path)] == failures


def test_three_failures_in_a_row_end_a_benchmark_and_no_other(tmp_path: Path) -> None:
    failing = Failing(0, 4, 6, 8, 10)
    loop, messages = said({"benchmarks": [failing, steps_done]}, tmp_path, range(1, 15))
    assert failing.called == [0, 2, 4, 6, 8]
    assert [message.partition(": ")[0] for message in messages] == [f"MUI at step {step}" for step in (0, 4, 6, 8)]
    assert messages[-1].endswith("injected, 3 in a row; it is run no more, training goes on.")
    assert steps_with(loop, "mui/benchmark/a") == loop.steps == [0, 2, 4, 6, 8, 10, 12, 14]


def test_each_has_its_own_count_of_failures(tmp_path: Path) -> None:
    first, second = Failing(*range(99)), Failing(0, 6, 8, 10)
    said({"benchmarks": [first, second]}, tmp_path, range(1, 15))
    assert first.called == [0, 2, 4]
    assert second.called == [0, 2, 4, 6, 8, 10]


def test_an_interval_ends_with_the_last_benchmark(tmp_path: Path) -> None:
    loop, _ = said({"benchmarks": Failing(*range(99)), "benchmarks_every": 3, "every": 100}, tmp_path, range(1, 13))
    assert loop.steps == [0, 3, 6]


def test_a_failure_ends_training_where_that_is_wanted(tmp_path: Path) -> None:
    loop = Loop(tmp_path, benchmarks=Failing(2), on_error="raise")
    with pytest.warns(UserWarning, match="injected"), pytest.raises(RuntimeError, match="injected"):
        loop.train(range(1, 5))
    assert loop.steps == [0, 2]  # after the point was written
    assert loop.memory.points[-1].failures == {"benchmark Failing": "RuntimeError: injected"}


def test_one_that_cannot_be_loaded_is_said_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ProbeSetError, match=r"missing\.jsonl: cannot read"):
        Loop(tmp_path, benchmarks=tmp_path / "missing.jsonl", tokenizer=ByT5Tokenizer())


def test_without_a_probe_there_is_no_benchmark(tmp_path: Path) -> None:
    """A point that failed is tried again by a run that goes on, with all that belongs to it."""
    loop = Loop(tmp_path, benchmarks=steps_done)
    handle = loop.model.model.layers[1].mlp.experts.register_forward_pre_hook(
        lambda module, args: None if module.training else 1 / 0
    )
    with pytest.warns(UserWarning, match="probe at step 2 failed"):
        loop.train([1, 2])
    handle.remove()
    loop.train([3, 4])
    assert steps_with(loop, "mui/benchmark/a") == [0, 4]


# In two processes


def fail_in_one(model: nn.Module, step: int) -> dict[str, float]:
    if torch.distributed.get_rank() == 1 and step == 4:
        raise RuntimeError("injected")
    return loss_of_four(model, step)


ASKED: dict[str, Any] = {"phase_window": 3, "phase_level": 0.01, "ablate": "neurons", "rules": "top_fraction=0.05"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("together")


@pytest.fixture(scope="module")
def together(directory: Path) -> list[Seen]:
    return launch(directory, train, benchmarks=[fail_in_one, steps_done], **ASKED)


def test_two_processes_find_the_same_and_stay_in_step(together: list[Seen], directory: Path) -> None:
    assert [seen.error for seen in together] == [None, None]
    assert together[0].measured == together[1].measured
    assert list(together[0].measured) == [0, 2, 4, 6, STEPS]
    for step, scalars in together[0].measured.items():
        assert ("mui/benchmark/loss" in scalars) == (step != 4)
        assert scalars["mui/benchmark/a"] == step
        assert {"mui/phase", "mui/a/phase", "mui/b/phase"} <= scalars.keys()
        assert ("mui/b/ablation/key" in scalars) == (step == STEPS)
    told = "RuntimeError: injected"
    assert together[0].warnings == [
        f"MUI at step 4: benchmark 'fail_in_one': ProbeError: process 1: {told}. Training goes on."
    ]
    assert together[1].warnings == [f"MUI at step 4: benchmark 'fail_in_one': {told}. Training goes on."]
    (line,) = [row for row in record(directory) if "failures" in row]
    assert (line["step"], list(line["failures"])) == (4, ["benchmark fail_in_one"])
    (ablation,) = [row["ablation"] for row in record(directory) if "ablation" in row]
    assert ablation["tasks"]["a"]["changes"]["key"]["value"] == together[0].measured[STEPS]["mui/a/ablation/key"]


def test_training_of_two_with_everything_is_the_same_to_the_bit(together: list[Seen], tmp_path: Path) -> None:
    for without, seen in zip(launch(tmp_path, train, is_monitored=False), together, strict=True):
        assert_same_to_the_bit(without.trained, seen.trained)


def test_two_that_go_on_make_the_calls_of_the_record_of_the_main_one(
    together: list[Seen], directory: Path, tmp_path: Path
) -> None:
    """In both, though one of them has no record."""
    output_dir(tmp_path, 0).mkdir()
    shutil.copy(output_dir(directory, 0) / "mui.jsonl", output_dir(tmp_path, 0))
    seen = launch(
        tmp_path,
        train,
        start_step=STEPS,
        n_steps=STEPS + 2,
        benchmarks=steps_done,
        at_end=False,
        **{**ASKED, "ablate": False},
    )
    first, second = (one.measured[STEPS + 2] for one in seen)
    assert first == second
    last = record(tmp_path)[-1]
    assert [last["tasks"]["a"]["phase"][end] for end in ("first_step", "last_step")] == [6, STEPS + 2]


def test_the_samples_of_a_benchmark_are_dealt_out_as_those_of_the_probe(tmp_path: Path) -> None:
    """Each process runs its part of them."""
    path, sizes, model = choices_file(tmp_path), [], moe_model()
    handle = model.model.layers[1].mlp.experts.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    run_benchmarks(as_benchmarks(path, ByT5Tokenizer()), model, 0)
    handle.remove()
    options = {"n_steps": 1, "at_end": False}
    with_it = launch(tmp_path / "with", train, benchmarks=path, tokenizer=ByT5Tokenizer(), **options)
    without = launch(tmp_path / "without", train, **options)
    for one, plain in zip(with_it, without, strict=True):
        n_tokens = sum(n for _, n in one.passes) - sum(n for _, n in plain.passes)
        assert 0 < n_tokens < 0.8 * sum(sizes)


def test_both_raise_a_failure_of_one_where_that_is_wanted(tmp_path: Path) -> None:
    seen = launch(tmp_path, train, benchmarks=fail_in_one, on_error="raise")
    assert [one.error for one in seen] == ["ProbeError: process 1: RuntimeError: injected", "RuntimeError: injected"]
    assert [point.step for point in seen[0].points] == [0, 2, 4]


def test_a_probe_that_fails_in_one_takes_no_benchmark_with_it(tmp_path: Path) -> None:
    seen = launch(tmp_path, train, benchmarks=steps_done, sabotage={1: fail_at(2)}, n_steps=4)
    assert [one.error for one in seen] == [None, None]
    for one in seen:
        assert {step: scalars.get("mui/benchmark/a") for step, scalars in one.measured.items()} == {0: 0, 4: 4}

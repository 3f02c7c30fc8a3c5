"""One contract for every way to train: the same points, no trace, and whole files whatever happens."""

from __future__ import annotations

import json
import signal
import warnings
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from asked import EVERYTHING, NOT_OF_THE_MODEL, loss_of_four, merged, steps_done
from integrations import INTEGRATIONS, Integration, Watch, failing, make_model, probe_set, raising_in_a_probe
from mui_callback import MUIProbe, MUIReport
from mui_callback.counts import ProbeCounts
from mui_callback.metrics.catalogue import OVERHEAD
from training import STEPS, Trained, assert_same_to_the_bit

POINTS = [0, 3, 6, STEPS]


@pytest.fixture(params=list(INTEGRATIONS))
def way(request: pytest.FixtureRequest) -> Integration:
    return INTEGRATIONS[request.param]


@pytest.fixture(autouse=True)
def interrupts_as_they_were() -> Iterator[None]:
    """Lightning ignores interrupts from the first one on."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("integrations")


@pytest.fixture
def without(way: Integration, directory: Path) -> Trained:
    return _fit(way, directory)[0]


@pytest.fixture
def watched(way: Integration, directory: Path) -> tuple[Trained, Watch]:
    return _fit(way, directory, watched=True)


@cache
def _fit(way: Integration, directory: Path, watched: bool = False) -> tuple[Trained, Watch]:
    watch = Watch()
    return way.fit(directory / way.name / str(watched), watch if watched else None), watch


def assert_same_report(first: MUIReport | None, second: MUIReport | None) -> None:
    assert first is not None
    assert second is not None
    for one, other in zip(first.counts.key_sets, second.counts.key_sets, strict=True):
        np.testing.assert_array_equal(one.neuron, other.neuron)
        np.testing.assert_array_equal(one.end, other.end)
    for part in (part for part in fields(ProbeCounts) if part.name != "key_sets"):
        np.testing.assert_array_equal(getattr(first.counts, part.name), getattr(second.counts, part.name), part.name)
    assert first.layout == second.layout
    assert first.probe_set == second.probe_set


def record(directory: Path) -> list[dict[str, Any]]:
    text = (directory / "mui.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def test_points_at_the_steps_of_the_schedule(watched: tuple[Trained, Watch], way: Integration, directory: Path) -> None:
    _, watch = watched
    assert watch.steps == POINTS
    assert watch.memory.closed
    header, *lines = record(directory / way.name / "True")
    assert [line["step"] for line in lines] == POINTS
    assert header["run"]["id"] == watch.memory.run.id
    assert header["run"]["start_step"] == 0


def test_the_same_model_gives_the_same_report_in_all_of_them(watched: tuple[Trained, Watch]) -> None:
    _, watch = watched
    assert_same_report(watch.memory.points[0].report, MUIProbe(make_model(), probe_set()).measure())


def test_a_report_is_of_the_weights_of_its_step(watched: tuple[Trained, Watch]) -> None:
    trained, watch = watched
    model = make_model()
    model.load_state_dict(trained.weights, strict=False)
    assert_same_report(watch.memory.points[-1].report, MUIProbe(model, probe_set()).measure())


def test_the_logged_values_are_the_same_in_all_of_them(watched: tuple[Trained, Watch], directory: Path) -> None:
    _, other = _fit(INTEGRATIONS["torch"], directory, watched=True)
    first, same = (dict(watch.memory.points[0].scalars) for watch in (watched[1], other))
    assert first.pop("mui/seconds") > 0
    assert same.pop("mui/seconds") > 0
    assert first == same
    assert [OVERHEAD in point.scalars for point in watched[1].memory.points] == [False, True, True, True]


def test_training_is_the_same_to_the_bit(without: Trained, watched: tuple[Trained, Watch]) -> None:
    assert_same_to_the_bit(without, watched[0])


# With all that can be asked for


@pytest.fixture
def asked(way: Integration, directory: Path) -> tuple[Trained, Watch]:
    return _fit_with_everything(way, directory)


@cache
def _fit_with_everything(way: Integration, directory: Path) -> tuple[Trained, Watch]:
    watch = Watch({**EVERYTHING, "every": 2, "benchmarks": [loss_of_four, steps_done]})
    return way.fit(directory / way.name / "asked", watch), watch


def test_training_with_everything_is_the_same_to_the_bit(without: Trained, asked: tuple[Trained, Watch]) -> None:
    assert_same_to_the_bit(without, asked[0])


def test_everything_is_found_in_all_of_them(asked: tuple[Trained, Watch], way: Integration, directory: Path) -> None:
    found = merged(asked[1].memory)
    assert list(found) == [0, 2, 4, 6, STEPS]
    for step, scalars in found.items():
        assert {"mui/benchmark/loss", "mui/benchmark/a", "mui/phase", "mui/a/phase", "mui/b/phase"} <= scalars.keys()
        assert ("mui/a/ablation/random_low" in scalars) == (step == STEPS)
    _, other = _fit_with_everything(INTEGRATIONS["torch"], directory)
    assert found[0] == merged(other.memory)[0]
    lines = record(directory / way.name / "asked")[1:]
    assert [line["tasks"]["a"]["phase"]["last_step"] for line in lines if "tasks" in line] == list(found)
    for step in found:
        recorded: dict[str, float] = {}
        for line in lines:
            recorded |= line["scalars"] if line["step"] == step else {}
        assert {name: value for name, value in recorded.items() if name not in NOT_OF_THE_MODEL} == found[step]


def test_a_benchmark_of_the_last_weights(asked: tuple[Trained, Watch]) -> None:
    trained, watch = asked
    model = make_model()
    model.load_state_dict(trained.weights, strict=False)
    with torch.no_grad():
        expected, _ = loss_of_four(model.eval(), STEPS)["loss"]
    assert merged(watch.memory)[STEPS]["mui/benchmark/loss"] == expected


# What goes wrong


def test_training_twice(way: Integration, tmp_path: Path) -> None:
    watch = Watch()
    for _ in range(2):
        way.fit(tmp_path, watch)
    assert watch.steps == POINTS * 2
    runs = [row["run"]["id"] for row in record(tmp_path) if "run" in row]
    assert len(set(runs)) == 2
    assert_same_report(watch.memory.points[-1].report, watch.memory.points[3].report)


def test_closing_twice(way: Integration, tmp_path: Path) -> None:
    watch = Watch()
    way.fit(tmp_path, watch)
    n_rows = len(record(tmp_path))
    watch.memory.closed = False
    watch.close()
    watch.close()
    assert not watch.memory.closed
    assert len(record(tmp_path)) == n_rows


def test_a_crash_in_the_training_leaves_what_was_measured(way: Integration, tmp_path: Path) -> None:
    watch = Watch()
    with pytest.raises(RuntimeError, match="crash"):
        way.fit(tmp_path, watch, on_step=failing(5, RuntimeError("crash")))
    assert [row.get("step") for row in record(tmp_path)] == [None, 0, 3]
    way.fit(tmp_path, watch)
    assert watch.steps == [0, 3, *POINTS]


def test_a_crash_in_a_probe_changes_nothing(without: Trained, way: Integration, tmp_path: Path) -> None:
    watch, model = Watch({"on_error": "warn", "batch_tokens": 30}), make_model()
    with raising_in_a_probe(model, RuntimeError("injected"), at_call=3), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained = way.fit(tmp_path, watch, model)
    assert_same_to_the_bit(without, trained)
    said = [str(w.message) for w in caught if "injected" in str(w.message)]
    assert said == ["MUI probe at step 0 failed; training goes on. RuntimeError: injected"]
    assert [point.error for point in watch.memory.points] == ["RuntimeError: injected", None, None, None]
    assert [row.get("error") for row in record(tmp_path)] == [None, "RuntimeError: injected", None, None, None]


def test_an_interrupt_in_a_probe_leaves_whole_files_and_a_whole_model(way: Integration, tmp_path: Path) -> None:
    watch, model = Watch({"batch_tokens": 30}), make_model()
    n_batches = len(MUIProbe(model, probe_set(), batch_tokens=30)._rounds)
    with (
        raising_in_a_probe(model, KeyboardInterrupt(), at_call=n_batches + 2),  # at step 3
        pytest.raises((KeyboardInterrupt, SystemExit)),
    ):
        way.fit(tmp_path, watch, model)
    assert [row.get("step") for row in record(tmp_path)] == [None, 0]
    assert all(module.training for module in model.modules())
    other = make_model()
    way.fit(tmp_path / "without", None, other)
    assert _n_hooks(model) == _n_hooks(other)
    assert torch.is_grad_enabled()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    way.fit(tmp_path, watch)
    assert watch.steps == [0, *POINTS]


def _n_hooks(model: nn.Module) -> dict[str, int]:
    return {name: len(module._forward_hooks) + len(module._forward_pre_hooks) for name, module in model.named_modules()}

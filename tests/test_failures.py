"""What happens when a probe fails, for whatever reason: nothing, to the training."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from integrations import INTEGRATIONS, Watch, make_model, probe_set
from mui_callback import MUIMonitor, MUIProbe
from mui_callback.errors import ProbeError
from mui_callback.parallel.processes import out_of_memory
from mui_callback.sinks.base import ProbePoint, RunDescription
from training import STEPS, Trained, assert_same_to_the_bit

LOOP = INTEGRATIONS["torch"]
TOO_MUCH = 2**50
"""Bytes that no machine has."""


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return LOOP.fit(tmp_path_factory.mktemp("without"), None)


@contextmanager
def in_each_pass(model: nn.Module, act: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Called with the token ids of each forward pass of a probe."""

    def hook(module: nn.Module, args: Any, options: dict[str, Any]) -> None:
        if not module.training:
            act(options["input_ids"])

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def fit(directory: Path, watch: Watch, model: nn.Module) -> tuple[Trained, list[str]]:
    """Also what was said about the probes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained = LOOP.fit(directory, watch, model)
    return trained, [str(w.message) for w in caught if "MUI" in str(w.message) or "failed" in str(w.message)]


def errors(watch: Watch) -> list[str | None]:
    return [point.error for point in watch.memory.points]


# Out of memory


def test_out_of_memory_halves_the_batch_until_it_fits(without: Trained, tmp_path: Path) -> None:
    model, watch, sizes = make_model(), Watch({"on_error": "warn"}), []
    whole = MUIProbe(model, probe_set())._rounds[0][0].n_positions

    def exhaust(ids: torch.Tensor) -> None:
        sizes.append(ids.numel())
        if ids.numel() > whole // 3:
            torch.empty(TOO_MUCH)

    with in_each_pass(model, exhaust):
        trained, said = fit(tmp_path, watch, model)
    assert_same_to_the_bit(without, trained)
    assert errors(watch) == [None] * 4
    assert len(said) == 2  # a half, and a quarter
    assert all("MUI: out of memory in a probe; going on with batches of" in message for message in said)
    assert "can't allocate memory" in said[0]
    # Nobody tries the large ones again.
    assert sum(size > whole // 3 for size in sizes) == len(said)
    # What is measured does not depend on it.
    report = MUIProbe(make_model(), probe_set()).measure()
    first = watch.memory.points[0].report
    assert first.settings.batch_tokens < whole // 3 < report.settings.batch_tokens
    assert first.key_neurons() == report.key_neurons()
    assert first.counts.loss == pytest.approx(report.counts.loss)


def test_out_of_memory_with_a_single_sample_gives_up(tmp_path: Path) -> None:
    model, watch = make_model(), Watch({"on_error": "warn"})
    with in_each_pass(model, lambda ids: torch.empty(TOO_MUCH) and None):
        _, said = fit(tmp_path, watch, model)
    assert "can't allocate memory" in errors(watch)[0]
    assert "probe at step 0 failed; training goes on" in next(message for message in said if "at step" in message)


def test_halving_ends(tmp_path: Path) -> None:
    probe = MUIProbe(make_model(), probe_set())
    sizes = []
    while probe.halve_batches():
        sizes.append(probe.settings.batch_tokens)
    assert sizes == sorted(set(sizes), reverse=True)
    assert all(len(batch.sample) == 1 for (batch,) in probe._rounds)


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_is_out_of_memory(error: Exception, is_memory: bool) -> None:
    assert out_of_memory(error) == is_memory


# Not a number


def test_a_model_that_is_nan_has_no_point(tmp_path: Path) -> None:
    model, watch = make_model(), Watch({"on_error": "warn"})
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    _, said = fit(tmp_path, watch, model)
    assert errors(watch)[0] == (
        "ProbeError: the loss of 8 of 8 samples is NaN or infinite: the model puts out no usable logits"
    )
    assert "no usable logits" in said[0]
    assert not watch.memory.points[0].scalars


def test_single_infinite_contributions_are_left_out_and_said(tmp_path: Path) -> None:
    model, watch = make_model(), Watch({"on_error": "warn", "every": None, "at_end": False})
    with torch.no_grad():  # a product that is too large, of factors that are not
        model.lm_head.weight[:, 0] = 1e30
        model.lm_head.weight[:, 0] *= torch.arange(384) == 5
        model.model.norm.weight[0] = 0
        model.model.layers[0].mlp.experts.down_proj[0, 0, 0] = 1e20
    with pytest.warns(UserWarning, match=r"MUI probe at step 0: \d+ contributions are NaN or infinite"):
        watch.monitor(model, tmp_path).close()
    assert watch.memory.points[0].scalars["mui/not_finite"] > 0


# Again and again


def test_after_three_failures_in_a_row_it_stops_and_says_so(without: Trained, tmp_path: Path) -> None:
    model, watch, passes = make_model(), Watch({"on_error": "warn", "every": 1}), []

    def fail(ids: torch.Tensor) -> None:
        passes.append(len(passes))
        if len(passes) != 3:
            raise RuntimeError("injected")

    with in_each_pass(model, fail):
        trained, said = fit(tmp_path, watch, model)
    assert_same_to_the_bit(without, trained)
    assert [error is not None for error in errors(watch)] == [True, True, False, True, True, True]
    assert watch.steps == [0, 1, 2, 3, 4, 5]
    assert [message.startswith("MUI probe at step 5 failed, 3 in a row; no more are made") for message in said] == [
        *[False] * 4,
        True,
    ]
    rows = [json.loads(line) for line in (tmp_path / "mui.jsonl").read_text().splitlines()][1:]
    assert [row["step"] for row in rows] == watch.steps
    assert [row.get("error") for row in rows] == errors(watch)
    assert all("in fail\n    raise RuntimeError" in row["traceback"] for row in rows if "error" in row)
    assert watch.memory.closed


# Sinks


class Broken:
    """A sink that raises from a certain call on."""

    def __init__(self, at: str) -> None:
        self.at = at

    def _call(self, name: str) -> None:
        if name == self.at:
            raise ConnectionError(f"gone in {name}")

    def open(self, run: RunDescription) -> None:
        self._call("open")

    def write(self, point: ProbePoint) -> None:
        self._call("write")

    def close(self) -> None:
        self._call("close")


@pytest.mark.parametrize("at", ["open", "write", "close"])
def test_a_broken_sink_is_named_once_and_nothing_is_lost(at: str, without: Trained, tmp_path: Path) -> None:
    watch = Watch({"on_error": "warn"})
    watch.options["sinks"] = [Broken(at), watch.memory]
    trained, said = fit(tmp_path, watch, make_model())
    assert_same_to_the_bit(without, trained)
    assert said == [f"Broken failed: ConnectionError: gone in {at}"]
    assert errors(watch) == [None] * 4
    assert watch.memory.closed


@pytest.mark.parametrize("at", ["open", "write", "close"])
def test_a_broken_sink_ends_training_where_that_is_wanted(at: str, tmp_path: Path) -> None:
    watch = Watch({"on_error": "raise"})
    watch.options["sinks"] = [Broken(at), watch.memory]
    with pytest.raises(ConnectionError, match=f"gone in {at}"):
        LOOP.fit(tmp_path, watch)
    assert watch.memory.run is not None  # it was told, though the other raised


def test_the_error_of_a_probe_ends_training_where_that_is_wanted(tmp_path: Path) -> None:
    model, watch = make_model(), Watch({"on_error": "raise", "every": 2})
    passes: list[int] = []

    def fail(ids: torch.Tensor) -> None:
        passes.append(1)
        if len(passes) == 2:
            raise RuntimeError("injected")

    with in_each_pass(model, fail), pytest.raises(RuntimeError, match="injected"):
        LOOP.fit(tmp_path, watch, model)
    assert errors(watch) == [None, "RuntimeError: injected"]
    assert watch.memory.closed


def test_an_error_at_the_first_point_closes_what_was_opened(tmp_path: Path) -> None:
    model, watch = make_model(), Watch({"on_error": "raise"})
    model.model.layers[0].mlp.forward = lambda hidden_states: hidden_states
    with pytest.raises(ProbeError, match="ran without calling its experts"):
        watch.monitor(model, tmp_path)
    assert watch.memory.closed


def test_a_record_that_cannot_be_written_does_not_stop_training(tmp_path: Path) -> None:
    watch = Watch({"on_error": "warn"})
    (tmp_path / "mui.jsonl").mkdir()
    _, said = fit(tmp_path, watch, make_model())
    assert len(said) == 1
    assert said[0].startswith("JsonlSink failed: IsADirectoryError")
    assert watch.steps == [0, 3, 6, STEPS]


def test_a_wrong_model_is_refused_whatever_the_policy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Linear"):
        MUIMonitor(nn.Linear(3, 3), probe_set(), output_dir=tmp_path, on_error="warn")
    assert not (tmp_path / "mui.jsonl").exists()

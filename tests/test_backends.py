"""Every way to train over several processes gives the report that one process gives of the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from backend_training import N_STEPS, PROBE_SETS, Trained, measured, probe, train
from backends import BACKENDS
from distributed_training import launch, output_dir
from mui_callback import MUIReport

IN_STEP = ("zero3", "zero3_list", "fsdp2", "fsdp2_nested", "moe_k2", "moe_ep2_dp2", "autoep", "hf_ep_all_to_all")
"""Some of those in whose forward passes processes exchange tensors."""
TRAINED = ("zero2", "zero3_list", "fsdp2_nested", "moe_k2", "autoep", "hf_ep_all_to_all", "hf_ep_all_reduce")


def assert_same_report(whole: MUIReport, parts: MUIReport) -> None:
    for rule in whole.rules:
        assert (parts.key_neuron_sets(rule) != whole.key_neuron_sets(rule)).nnz == 0
    assert np.array_equal(parts.counts.routed, whole.counts.routed)
    assert np.array_equal(parts.counts.correct, whole.counts.correct)
    assert parts.counts.loss == pytest.approx(whole.counts.loss, abs=1e-5)
    assert parts.counts.choice_loss == pytest.approx(whole.counts.choice_loss, abs=1e-5)
    assert parts.counts.sample_mass == pytest.approx(whole.counts.sample_mass, rel=1e-5)
    assert parts.counts.mass == pytest.approx(whole.counts.mass, rel=1e-5)
    left_out = {"mui/seconds", "mui/comm_bytes", "mui/dropped_tokens", "mui/identity_error"}
    rates, expected = ({k: v for k, v in report.scalars().items() if k not in left_out} for report in (parts, whole))
    assert rates == pytest.approx(expected, abs=1e-6, rel=1e-6)
    assert parts.identity_error is not None
    assert parts.identity_error < 1e-5


@pytest.mark.parametrize("name", BACKENDS)
def test_the_report_is_that_of_one_process(name: str, tmp_path: Path) -> None:
    backend = BACKENDS[name]
    whole = measured(backend.reference())
    of_process = launch(tmp_path, probe, size=backend.size, name=name)
    for reports in of_process:
        for probe_set in PROBE_SETS:
            assert_same_report(whole[probe_set], reports[probe_set])
            assert reports[probe_set].comm_bytes == of_process[0][probe_set].comm_bytes > 0


@pytest.mark.parametrize("name", [name for name in BACKENDS if "one_sided" in name])
def test_all_tokens_go_to_the_experts_of_one_process(name: str) -> None:
    report = measured(BACKENDS[name].reference())["many"]
    for layer in range(len(report.layout.layers)):
        routed = report.counts.routed.sum(0)[(report.layout.layer_of_expert == layer) & ~report.layout.is_shared]
        assert routed.sum() > 0
        assert not routed[len(routed) // 2 :].any()


@pytest.mark.parametrize("name", TRAINED)
def test_training_is_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    size = BACKENDS[name].size
    without = launch(tmp_path / "without", train, size=size, name=name, is_monitored=False)
    probed = launch(tmp_path / "probed", train, size=size, name=name)
    for plain, watched in zip(without, probed, strict=True):
        assert watched.error is None
        assert watched.warnings == []
        assert_trained_alike(plain, watched)
    assert [point.step for point in probed[0].points] == list(range(N_STEPS + 1))
    assert all(point.error is None for point in probed[0].points)
    assert len({point.scalars["mui/loss"] for point in probed[0].points if point.scalars}) == N_STEPS + 1
    assert [bool(one.points) for one in probed] == [True] + [False] * (size - 1)
    assert [(output_dir(tmp_path / "probed", rank) / "mui.jsonl").exists() for rank in range(size)] == [
        rank == 0 for rank in range(size)
    ]


def assert_trained_alike(one: Trained, other: Trained) -> None:
    assert one.losses == other.losses
    assert one.modes == other.modes
    assert one.random is not None
    assert other.random is not None
    assert torch.equal(one.random, other.random)
    assert len(one.weights) == len(other.weights)
    assert all(torch.equal(a, b) for a, b in zip(one.weights, other.weights, strict=True))


@pytest.mark.parametrize("name", IN_STEP)
def test_what_fails_in_reading_fails_everywhere_and_training_goes_on(name: str, tmp_path: Path) -> None:
    size = BACKENDS[name].size
    seen = launch(tmp_path, train, size=size, name=name, fails_reading=(1, 2))
    for process in seen:
        assert process.error is None
        assert len(process.losses) == N_STEPS
        (warning,) = process.warnings
        assert "step 2 failed; training goes on" in warning
        assert "injected in process 1" in warning
    errors = [point.error for point in seen[0].points]
    assert [error is None for error in errors] == [True, True, False, True]
    assert "process 1: RuntimeError: injected in process 1" in str(errors[2])


@pytest.mark.parametrize("name", ["zero3", "fsdp2", "moe_k2"])
def test_what_fails_in_the_model_ends_every_process(name: str, tmp_path: Path) -> None:
    seen = launch(tmp_path, train, size=BACKENDS[name].size, name=name, fails_forward=(1, 2))
    for process in seen:
        assert len(process.losses) == 2
        assert str(process.error).startswith("InterruptedPassError: process")
    assert "injected in process 1" in str(seen[1].error)
    assert "InterruptedPassError" in str(seen[0].points[-1].error)

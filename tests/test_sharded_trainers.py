"""Trainers that spread a model over processes: the same report as one process, and training the same to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from backend_training import measured
from backends import BACKENDS
from distributed_training import launch
from mui_callback import MUIReport
from sharded_trainers import N_STEPS, TRAINERS, train
from test_backends import assert_same_report


@pytest.fixture(scope="module")
def whole() -> MUIReport:
    return measured(BACKENDS["fsdp2"].reference())["many"]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_trainer_that_spreads_the_model(trainer: str, whole: MUIReport, tmp_path: Path) -> None:
    without = launch(tmp_path / "without", train, trainer=trainer, is_probed=False)
    first, second = launch(tmp_path / "probed", train, trainer=trainer)
    assert [first["losses"], second["losses"]] == [process["losses"] for process in without]
    assert len(first["losses"]) == N_STEPS
    assert [point.error for point in first["points"]] == [None] * (N_STEPS + 1)
    assert second["points"] == []
    assert_same_report(whole, first["points"][0].report)

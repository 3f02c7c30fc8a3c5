"""What cannot be measured in a distributed run is refused in every process, and says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from backend_training import SETTINGS, many
from distributed_training import launch
from mui_callback import MUIProbe
from refused import alone, fail_in_the_transpose, probe_a_part_first, probe_sharded_later, refusal, train_apart
from tiny import build

IN_FOUR = ("tensor-parallel attention and FSDP2", "two models")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("tensor-parallel experts", "each process has a part of every expert"),
        ("tensor-parallel attention", "got a part of one (DTensor). Tensor parallelism"),
        ("tensor-parallel attention and FSDP2", "got a part of one (DTensor). Tensor parallelism"),
        ("tensor-parallel shared experts", "each process has a part of every expert"),
        ("two models", "weights are spread over 2 of them"),
        ("AutoTP", "got a part of one (LinearLayer). Tensor parallelism"),
        ("sequences", "sequence parallelism"),
        ("stages", "pipeline parallelism"),
        ("PipelineModule", "pipeline parallelism"),
        ("other samples", "expected one probe set in all processes"),
    ],
)
def test_refused(kind: str, message: str, tmp_path: Path) -> None:
    told = launch(tmp_path, refusal, kind=kind, size=4 if kind in IN_FOUR else 2)
    assert all(message in one for one in told)
    assert told[1].startswith(("UnsupportedModelError", "ProbeSetError"))


def test_processes_with_models_of_their_own_probe_them_by_themselves(tmp_path: Path) -> None:
    alone = [MUIProbe(build("qwen2_moe", seed=rank), many(), **SETTINGS).measure() for rank in range(2)]
    expected = [f"{report.n_samples} samples, {report.pooled.loss}" for report in alone]
    assert launch(tmp_path, refusal, kind="own weights") == expected
    assert expected[0] != expected[1]


def test_processes_that_train_apart_are_probed_by_themselves_from_then_on(tmp_path: Path) -> None:
    together, *apart = zip(*launch(tmp_path, train_apart), strict=True)
    assert together == (together[0],) * 2
    for losses in apart:
        assert losses == (alone(0), alone(1))
        assert losses[0] != losses[1]


def test_a_model_may_be_spread_after_the_probe_was_made(tmp_path: Path) -> None:
    assert launch(tmp_path, probe_sharded_later) == [pytest.approx(0, abs=1e-5)] * 2


def test_what_fails_while_experts_are_read_together_ends_every_process(tmp_path: Path) -> None:
    told = launch(tmp_path, fail_in_the_transpose, is_of_the_model=False)
    assert "no memory" in told[1]
    assert all(one.startswith("InterruptedPassError: ") for one in told)


def test_experts_that_cannot_be_read_in_any_process_are_no_reason_to_end_the_training(tmp_path: Path) -> None:
    told = launch(tmp_path, fail_in_the_transpose, is_of_the_model=True)
    assert told == ["ProbeError: not linear"] * 2


def test_a_part_of_what_fsdp_shards_may_be_probed_before_the_whole_has_run(tmp_path: Path) -> None:
    first, second = launch(tmp_path, probe_a_part_first)
    assert first == second > 0

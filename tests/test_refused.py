"""What cannot be measured in a distributed run is refused in every process, and says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from backend_training import SETTINGS, many
from distributed_training import launch
from mui_callback import MUIProbe
from refused import refusal
from tiny import build


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("tensor-parallel experts", "each process has a part of every expert"),
        ("tensor-parallel attention", "got a part of one (DTensor). Tensor parallelism"),
        ("AutoTP", "got a part of one (LinearLayer). Tensor parallelism"),
        ("stages", "pipeline parallelism"),
        ("PipelineModule", "pipeline parallelism"),
        ("other samples", "expected one probe set in all processes"),
    ],
)
def test_refused(kind: str, message: str, tmp_path: Path) -> None:
    told = launch(tmp_path, refusal, kind=kind)
    assert message in told[1]
    assert message in told[0]
    assert told[1].startswith(("UnsupportedModelError", "ProbeSetError"))


def test_processes_with_models_of_their_own_probe_them_by_themselves(tmp_path: Path) -> None:
    alone = [MUIProbe(build("qwen2_moe", seed=rank), many(), **SETTINGS).measure() for rank in range(2)]
    expected = [f"{report.samples} samples, {report.pooled.loss}" for report in alone]
    assert launch(tmp_path, refusal, kind="own weights") == expected
    assert expected[0] != expected[1]

"""Whatever happens to W&B: training goes on without delay, the record has everything, and one warning at most is given.

How long W&B itself waits in ``wandb.init`` and ``finish`` is not ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TROUBLES = [
    "nothing",
    "refuses from the beginning",
    "hangs from the beginning",
    "is not there",
    "refuses",
    "hangs",
    "denies",
    "vanishes",
    "W&B's process is killed",
    "the disk of the run is full",
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trouble")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    command = [sys.executable, str(HERE / "troubled_training.py"), str(directory), *TROUBLES]
    subprocess.run(command, env=environment, check=True, timeout=300, cwd=HERE)
    return directory


@pytest.mark.parametrize("trouble", TROUBLES)
def test_training_goes_on(trouble: str, directory: Path) -> None:
    seen = json.loads((directory / trouble / "seen.json").read_text())
    *steps, end = seen["seconds"]
    assert len(steps) == 8
    assert max(steps) < 10  # what hangs does so without end
    assert end < 60  # with the last pictures, for which it waits half of that at most
    lines = [json.loads(line) for line in (directory / trouble / "mui.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("scalars")] == list(range(9))
    failed = [said.partition(" failed")[0] for said in seen["said"] if " failed" in said]
    assert failed == (["WandbSink"] if trouble == "W&B's process is killed" else [])  # and not the pictures, too


def test_without_trouble_the_server_has_every_point(directory: Path) -> None:
    assert json.loads((directory / "nothing" / "seen.json").read_text())["rows"] == list(range(9))


def test_the_disk_was_full(directory: Path) -> None:
    (file,) = (directory / "the disk of the run is full").glob("wandb/run-*/*.wandb")
    (other,) = (directory / "nothing").glob("wandb/run-*/*.wandb")
    assert file.stat().st_size < 400_000 < other.stat().st_size

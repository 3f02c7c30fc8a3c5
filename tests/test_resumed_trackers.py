"""Runs that go on in the same tracker: each point is there once, though steps are trained again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from test_trackers import in_csv, in_record, in_tensorboard, in_trackio, only_mui
from wandb_server import WandbServer

HERE = Path(__file__).parent
STEP_KEYS = {"in_transformers": "train/global_step", "in_lightning": "trainer/global_step", "in_a_loop": "step"}
POINTS = {"in_transformers": [0, 2, 4, 6, 8], "in_lightning": [0, 1, 3, 5, 7], "in_a_loop": [0, 2, 4, 6, 8]}
"""In Lightning's counting, which begins at 0."""
OFFLINE = {"in_transformers": "in_transformers", "in_a_loop": "loop"}
"""The ways that are tried without a server, too, and their runs."""


@pytest.fixture(scope="module")
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server


@pytest.fixture(scope="module")
def directory(server: WandbServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all trainings, with a folder for those that are online and for those that are not."""
    directory = tmp_path_factory.mktemp("resumed")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    names = [*(f"online/{way}" for way in STEP_KEYS), *(f"offline/{way}" for way in OFFLINE)]
    command = [sys.executable, str(HERE / "resumed_training.py"), str(directory), *names]
    subprocess.run(command, env={**clean, **server.environment}, check=True, timeout=400, cwd=HERE)
    return directory


def assert_each_point_once(rows: list[dict[str, Any]], way: str, output_dir: Path) -> None:
    """And what the user logs at steps that were trained again is there again, as without us."""
    key = STEP_KEYS[way]
    logged = [row for row in rows if "mui/mui" in row]
    assert [row[key] for row in logged] == POINTS[way]
    points = in_record(output_dir)
    assert list(points) == [0, 2, 4, 6, 8]
    for row, scalars in zip(logged, points.values(), strict=True):
        assert {name: row[name] for name in scalars} == pytest.approx(scalars)
    drawn = [row for row in rows if "mui/pictures/step" in row]
    assert [row["mui/pictures/step"] for row in drawn] == sorted({row["mui/pictures/step"] for row in drawn})
    assert drawn[-1]["mui/pictures/step"] == POINTS[way][-1]
    assert f" {len(points)} probes up to the ring" in caption(drawn[-1])  # those before the pause, too
    losses = [row[key] for row in rows if {"loss", "train/loss"} & row.keys()]
    assert losses
    assert set(losses) == set(range(8) if way == "in_lightning" else range(1, 9))


def caption(row: dict[str, Any]) -> str:
    """Of the trajectory; offline, values inside of values have names with dots."""
    name = "mui/pictures/trajectory"
    return str(row[name]["caption"] if name in row else row[f"{name}.caption"])


def test_online(server: WandbServer, directory: Path) -> None:
    directory /= "online"
    for way, run in zip(STEP_KEYS, ("in_transformers", "lightning", "loop"), strict=True):
        assert_each_point_once(server.runs[run].history, way, directory / way)
    assert len(server.runs) == 3
    found = only_mui(in_tensorboard(directory)), only_mui(in_trackio(directory))
    for values in found:
        assert list(values) == [0, 2, 4, 6, 8]
    both: dict[int, Any] = {}
    for version in (0, 1):
        some = only_mui(in_csv(directory / "in_lightning" / "lightning_logs" / f"version_{version}"))
        assert not both.keys() & some.keys()
        both |= some
    assert list(both) == POINTS["in_lightning"]


def test_offline(directory: Path) -> None:
    directory /= "offline"
    wandb = shutil.which("wandb", path=Path(sys.executable).parent)
    for way, run in OFFLINE.items():
        rows: list[dict[str, Any]] = []
        parts = sorted(directory.rglob(f"offline-run-*-{run}"), key=lambda part: part.name)
        assert len(parts) == 2
        for part in parts:  # a directory for each process, which `wandb sync` puts together
            shown = subprocess.run(
                [str(wandb), "leet", "inspect", "--json", str(part)], capture_output=True, check=True, text=True
            )
            records = map(json.loads, shown.stdout.splitlines())
            rows += [record["history"]["item"] for record in records if record["type"] == "history"]
        assert_each_point_once(rows, way, directory / way)

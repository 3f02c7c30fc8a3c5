"""Runs that go on in the same tracker: each point is there once, though steps are trained again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from test_trackers import in_csv, in_record, in_tensorboard, in_trackio, only_mui
from wandb_server import WandbServer

HERE = Path(__file__).parent
STEP_KEYS = {"in_transformers": "train/global_step", "in_lightning": "trainer/global_step", "in_a_loop": "step"}
POINTS = {"in_transformers": [0, 2, 4, 6, 8], "in_lightning": [0, 1, 3, 5, 7], "in_a_loop": [0, 2, 4, 6, 8]}
"""In Lightning's counting, which begins at 0."""


def train(directory: Path, environment: dict[str, str], *ways: str) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    of_trackers = {
        "WANDB_RUN_ID": "in_transformers",
        "WANDB_RESUME": "allow",
        "WANDB_DIR": str(directory),
        "WANDB_SILENT": "true",
        "TENSORBOARD_LOGGING_DIR": str(directory / "tensorboard"),
        "TRACKIO_DIR": str(directory / "trackio"),
        "TRACKIO_AUTO_LOG_CPU": "0",
    }
    command = [sys.executable, str(HERE / "resumed_training.py"), str(directory), *ways]
    subprocess.run(command, env={**clean, **of_trackers, **environment}, check=True, timeout=400, cwd=HERE)


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


def test_online(tmp_path: Path) -> None:
    with WandbServer() as server:
        train(tmp_path, server.environment, *STEP_KEYS)
    for way, run in zip(STEP_KEYS, ("in_transformers", "lightning", "loop"), strict=True):
        assert_each_point_once(server.runs[run].history, way, tmp_path / way)
    assert len(server.runs) == 3
    found = only_mui(in_tensorboard(tmp_path)), only_mui(in_trackio(tmp_path))
    for values in found:
        assert list(values) == [0, 2, 4, 6, 8]
    both: dict[int, Any] = {}
    for version in (0, 1):
        some = only_mui(in_csv(tmp_path / "in_lightning" / "lightning_logs" / f"version_{version}"))
        assert not both.keys() & some.keys()
        both |= some
    assert list(both) == POINTS["in_lightning"]


def test_offline(tmp_path: Path) -> None:
    runs = {"in_transformers": "in_transformers", "in_a_loop": "loop"}
    train(tmp_path, {"WANDB_MODE": "offline"}, *runs)
    wandb = shutil.which("wandb", path=Path(sys.executable).parent)
    for way, run in runs.items():
        rows: list[dict[str, Any]] = []
        parts = sorted(tmp_path.rglob(f"offline-run-*-{run}"), key=lambda part: part.name)
        assert len(parts) == 2
        for part in parts:  # a directory for each process, which `wandb sync` puts together
            shown = subprocess.run(
                [str(wandb), "leet", "inspect", "--json", str(part)], capture_output=True, check=True, text=True
            )
            records = map(json.loads, shown.stdout.splitlines())
            rows += [record["history"]["item"] for record in records if record["type"] == "history"]
        assert_each_point_once(rows, way, tmp_path / way)

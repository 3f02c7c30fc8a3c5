"""The examples run as they are."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from mui_callback.experts.adapters import unregister_adapter

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def read(directory: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    header, *points = [json.loads(line) for line in (directory / "mui.jsonl").read_text().splitlines()]
    return header["run"], points


def test_the_hugging_face_trainer(tmp_path: Path) -> None:
    load("hf_trainer")["main"](output_dir=str(tmp_path), steps=120)
    run, points = read(tmp_path)
    assert run["tasks"] == ["addition"]
    assert [point["step"] for point in points] == [0, 100, 120]
    assert points[2]["scalars"]["mui/addition/loss"] < points[0]["scalars"]["mui/addition/loss"]


def test_lightning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("lightning_module")["main"](output_dir=str(tmp_path), steps=120)
    run, points = read(tmp_path)
    assert run["tasks"] == ["eval"]
    assert [point["step"] for point in points] == [0, 100, 120]
    assert points[2]["scalars"]["mui/loss"] < points[0]["scalars"]["mui/loss"]
    (csv,) = tmp_path.glob("lightning_logs/*/metrics.csv")
    assert str(csv) in capsys.readouterr().out
    assert "mui/mui" in csv.read_text()


def test_a_plain_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = load("plain_loop")
    try:
        example["main"](output_dir=str(tmp_path), steps=5, every=2)
    finally:
        unregister_adapter(example["mixture"])
    _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["0", "2", "4", "5"]
    _, points = read(tmp_path)
    assert all("error" not in point for point in points)
    # Without the adapter the shared branch is not seen, and nothing is reported.
    with pytest.warns(UserWarning, match="do not add up"):
        example["main"](output_dir=str(tmp_path), steps=0)
    assert "ProbeError: layer 0" in capsys.readouterr().out.splitlines()[-1]

"""A study that is killed at any moment goes on with the same command, and ends with the same table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("killed")
    subprocess.run([sys.executable, str(HERE / "killed_study.py"), str(directory)], check=True, timeout=400, cwd=HERE)
    found: dict[str, Any] = json.loads((directory / "seen.json").read_text())
    return found


def test_the_table_is_that_of_an_undisturbed_study(seen: dict[str, Any]) -> None:
    expected = seen["tables"]["undisturbed"]
    assert [row["step"] for row in expected] == [5, 10]
    assert {name: rows == expected for name, rows in seen["tables"].items()} == dict.fromkeys(seen["tables"], True)


def test_it_was_killed_at_many_moments(seen: dict[str, Any]) -> None:
    assert seen["killed"]["change"] > 12
    assert seen["killed"]["clock"] > 0
    assert len(seen["tables"]) == seen["killed"]["change"] + 6  # of the clock, the undisturbed one, and the last


def test_nothing_is_left_behind(seen: dict[str, Any]) -> None:
    assert seen["left"] == []

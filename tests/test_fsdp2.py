"""Weights that FSDP2 has left whole, after an evaluation for example, are still so after a probe."""

from __future__ import annotations

from pathlib import Path

import pytest

from backend_training import probe_after
from backends import BACKENDS
from distributed_training import launch


@pytest.mark.parametrize("before", ["nothing", "evaluated", "unsharded"])
@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_nested"])
def test_weights_are_where_they_were(name: str, before: str, tmp_path: Path) -> None:
    whole = {path: value.numel() for path, value in BACKENDS[name].reference().state_dict().items()}
    first, second = launch(tmp_path, probe_after, name=name, before=before)
    assert first["sizes"].keys() == whole.keys()
    for seen in (first, second):
        assert seen["is as before"]
        assert all(seen["sizes"][path] >= n for path, n in whole.items())
        assert seen["losses"] == first["losses"]
        assert seen["losses"][0] == seen["losses"][1]
        assert seen["next loss"] == first["next loss"]


def test_a_probe_does_not_depend_on_what_is_whole(tmp_path: Path) -> None:
    seen = [
        launch(tmp_path / before, probe_after, name="fsdp2", before=before)[0] for before in ("nothing", "evaluated")
    ]
    assert seen[0]["losses"] == pytest.approx(seen[1]["losses"], rel=1e-6)
    assert seen[0]["next loss"] == seen[1]["next loss"]

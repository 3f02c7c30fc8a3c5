"""Checkpoints on the hub, without one."""

from __future__ import annotations

from pathlib import Path

import pytest

from mui_callback.demo.model import build_tokenizer
from mui_callback.loading import ModelSource
from mui_callback.trajectory import hub
from mui_callback.trajectory.hub import Downloads, HubRevision


def test_a_tokenizer_is_read_without_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A dry run reads it, which downloads nothing large.
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("all files were downloaded"))
    asked: list[ModelSource] = []

    def load(source: ModelSource) -> object:
        asked.append(source)
        return build_tokenizer()

    monkeypatch.setattr(hub, "load_tokenizer", load)
    source = ModelSource("someone/model", "step120-tokens1B")
    assert HubRevision(source, Downloads(tmp_path / "downloads")).load_tokenizer() is not None
    assert asked == [source]

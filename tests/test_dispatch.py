"""Routers of DeepSpeed tell where their tokens go; that is believed where it is so, and only there."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from backend_training import SETTINGS, many
from backends import BACKENDS
from dispatch_probes import LIES, measure
from distributed_training import launch
from mui_callback import MUIProbe, MUIReport
from test_backends import assert_same_report

TOLD = ("moe_k1", "moe_k2", "moe_k4", "autoep")
"""Those whose routers are known."""


@cache
def alone(name: str) -> MUIReport:
    """The report of the same weights in one process."""
    return MUIProbe(BACKENDS[name].reference(), many(), **SETTINGS).measure()


@pytest.mark.parametrize("name", TOLD)
def test_a_router_that_tells_is_believed_in_every_layer(name: str, tmp_path: Path) -> None:
    for (seen,) in launch(tmp_path, measure, name=name):
        n_layers = len(alone(name).layout.layers)
        assert seen.believes == [True] * n_layers
        assert seen.n_batches > 1
        assert (seen.n_asked, seen.n_followed) == (n_layers, (seen.n_batches - 1) * n_layers)
        assert_same_report(alone(name), seen.report)


@pytest.mark.parametrize(("name", "rank"), [("moe_k2", 1), ("autoep", 0)])
def test_one_that_lies_to_one_process_is_believed_by_none(name: str, rank: int, tmp_path: Path) -> None:
    for process in launch(tmp_path, measure, name=name, liar=rank, lies=tuple(LIES)):
        for lie, seen in zip(LIES, process, strict=True):
            n_layers = len(alone(name).layout.layers)
            assert seen.believes == [False] * n_layers, lie
            assert (seen.n_asked, seen.n_followed) == (seen.n_batches * n_layers, 0), lie
            assert_same_report(alone(name), seen.report)

"""Routers of DeepSpeed tell where their tokens go; that is believed where it is so, and only there."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from backends import BACKENDS
from dispatch_probes import (
    LIES,
    SETTINGS,
    measure,
    measure_in_another_precision,
    measure_with_a_failure_between,
    measure_with_a_lie_between,
    reaching,
)
from distributed_training import launch
from mui_callback import MUIProbe, MUIReport
from test_backends import assert_same_report

TOLD = ("moe_k1", "moe_k2", "moe_k4", "autoep")
"""Those whose routers are known."""


@cache
def alone(name: str) -> MUIReport:
    """The report of the same weights in one process."""
    return MUIProbe(BACKENDS[name].reference(), reaching(), **SETTINGS).measure()


@pytest.mark.parametrize("name", TOLD)
def test_a_router_that_tells_is_believed_in_every_layer(name: str, tmp_path: Path) -> None:
    for first, second in launch(tmp_path, measure, name=name, times=2):
        n_layers, n_batches = len(alone(name).layout.layers), first.n_batches
        assert first.believes == [True] * n_layers
        assert n_batches > 1
        assert (first.n_asked, first.n_followed) == (n_layers, (n_batches - 1) * n_layers)
        assert (second.n_asked, second.n_followed) == (0, n_batches * n_layers)
        for seen in (first, second):
            assert_same_report(alone(name), seen.report)
            assert seen.report.identity_error < 1e-5


@pytest.mark.parametrize(("name", "rank"), [("moe_k2", 1), ("autoep", 0)])
def test_one_that_lies_to_one_process_is_believed_by_none(name: str, rank: int, tmp_path: Path) -> None:
    for process in launch(tmp_path, measure, name=name, liar=rank, lies=tuple(LIES), times=2):
        for lie, seen in zip([lie for lie in LIES for _ in range(2)], process, strict=True):
            n_layers = len(alone(name).layout.layers)
            assert seen.believes == [False] * n_layers, lie
            assert (seen.n_asked, seen.n_followed) == (seen.n_batches * n_layers, 0), lie
            assert_same_report(alone(name), seen.report)


@pytest.mark.parametrize("name", ["moe_k2", "autoep"])
def test_a_believed_router_that_begins_to_lie_is_found_out(name: str, tmp_path: Path) -> None:
    for before, meanwhile, after in launch(tmp_path, measure_with_a_lie_between, name=name):
        assert meanwhile.n_asked == meanwhile.n_batches * before.n_asked
        assert after.n_asked == before.n_asked > 0
        for seen in (before, meanwhile, after):
            assert_same_report(alone(name), seen.report)


def test_what_was_learned_in_one_precision_does_not_hold_in_another(tmp_path: Path) -> None:
    for before, inside, again, after in launch(tmp_path, measure_in_another_precision, name="moe_k2"):
        assert_same_report(alone("moe_k2"), before.report)
        assert_same_report(alone("moe_k2"), after.report)
        assert after.n_asked == before.n_asked
        # products that autocast makes are not plain ones
        assert inside.n_followed == again.n_followed == 0
        assert inside.n_asked == again.n_asked == before.n_asked * before.n_batches
        assert inside.report.pooled.loss == pytest.approx(before.report.pooled.loss, rel=0.05)


@pytest.mark.parametrize("name", ["moe_k2", "autoep"])
def test_after_a_failure_of_one_all_learn_anew(name: str, tmp_path: Path) -> None:
    for first, second, third in launch(tmp_path, measure_with_a_failure_between, name=name):
        assert second.n_asked == first.n_asked > third.n_asked == 0
        for seen in (first, second, third):
            assert_same_report(alone(name), seen.report)

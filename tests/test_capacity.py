"""What the routers of DeepSpeed would drop, against a count by hand."""

from __future__ import annotations

from collections import Counter
from math import ceil
from pathlib import Path
from typing import Any

import pytest

from backend_training import SETTINGS, many
from backends import BACKENDS
from distributed_training import launch
from mui_callback import MUIProbe, MUIReport

SETTINGS_OF_GATES = ("drop_tokens", "use_rts", "top2_2nd_expert_sampling", "min_capacity", "capacity_factor")


def watch(rank: int, directory: Path, *, name: str, capacity_factor: float, drop_tokens: bool) -> dict[str, Any]:
    """The report, and the experts that each router chose for the tokens of each batch of samples."""
    model = BACKENDS[name].build().model
    gates: list[Any] = [module for module in model.modules() if hasattr(module, "drop_tokens")]
    chosen: list[list[list[int]]] = []
    masks: list[list[bool]] = []
    for gate in gates:
        gate.capacity_factor, gate.drop_tokens, gate.min_capacity = capacity_factor, drop_tokens, 1
        gate.register_forward_hook(lambda gate, args, out: chosen.append(out[3].tolist()))
    model.module.register_forward_pre_hook(
        lambda module, args, options: masks.append(options["attention_mask"].flatten().bool().tolist()),
        with_kwargs=True,
    )
    before = [{setting: getattr(gate, setting) for setting in SETTINGS_OF_GATES} for gate in gates]
    probe = MUIProbe(model, many(), **SETTINGS)
    report = probe.measure()
    assert before == [{setting: getattr(gate, setting) for setting in SETTINGS_OF_GATES} for gate in gates]
    is_scored = [not batches[rank].is_stand_in for batches in probe._rounds]  # choices come after them
    pairs = [
        [
            e
            for route in chosen[len(gates) * number + gate]
            for e, kept in zip(route, masks[number], strict=True)
            if kept
        ]
        for number, is_counted in enumerate(is_scored)
        if is_counted
        for gate in range(len(gates))
    ]
    return {"report": report, "pairs": pairs}


@pytest.mark.parametrize(("name", "n_experts", "k"), [("moe_k1", 4, 1), ("moe_k2", 4, 2), ("moe_k4", 8, 4)])
def test_dropped_tokens(name: str, n_experts: int, k: int, tmp_path: Path) -> None:
    factor = 0.8
    seen = launch(tmp_path, watch, name=name, capacity_factor=factor, drop_tokens=True)
    pairs = [pairs for process in seen for pairs in process["pairs"]]
    assert all(-1 not in one for one in pairs)  # all pass
    places = [max(1, ceil(len(one) / k / n_experts * factor * k)) for one in pairs]
    dropped = sum(max(0, n - most) for one, most in zip(pairs, places, strict=True) for n in Counter(one).values())
    assert dropped > 0
    for process in seen:
        report: MUIReport = process["report"]
        assert report.dropped_tokens == dropped / sum(map(len, pairs))
        assert report.scalars()["mui/dropped_tokens"] == report.dropped_tokens


def test_nothing_is_said_where_nothing_is_dropped(tmp_path: Path) -> None:
    for process in launch(tmp_path, watch, name="moe_k2", capacity_factor=1.0, drop_tokens=False):
        assert process["report"].dropped_tokens is None
        assert "mui/dropped_tokens" not in process["report"].scalars()

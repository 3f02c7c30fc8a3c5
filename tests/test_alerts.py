"""What is told of a run: of made-up trajectories, by hand; of a real one, in the log, in the record and in W&B."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from integrations import make_model, probe_set
from mui_callback import MemorySink, MUIMonitor
from mui_callback.monitoring.alert_rule import AlertRule, alerts_at
from mui_callback.monitoring.alerts import Alerts
from mui_callback.monitoring.asked import Asked
from training import rows

GINI, DEAD, OVERHEAD = "mui/expert_gini", "mui/dead_experts", "mui/overhead"
Points = dict[int, dict[str, float]]


def series(name: str, values: list[float]) -> Points:
    return {10 * number: {name: value} for number, value in enumerate(values)}


def told(points: Points, rule: AlertRule = AlertRule(), budget: float | None = 0.01) -> list[tuple[int, str]]:  # noqa: B008
    """Steps and kinds, as a run would have it that looks at each of its points in turn."""
    so_far: Points = {}
    found = []
    for step, scalars in points.items():
        so_far[step] = scalars
        found += [(alert.step, alert.kind) for alert in alerts_at(step, so_far, budget, rule)]
    return found


PHASES = {
    "enters once": ([0, 1, -2, -2, -2], [(20, "collapsing")]),
    "undecided ends nothing": ([1, -2, 0, -2, 0, 0, -2], [(10, "collapsing")]),
    "another phase ends it": ([-2, 0, 1, -2], [(0, "collapsing"), (30, "collapsing")]),
    "from one to the other": ([-1, -2, -1], [(0, "coarsening"), (10, "collapsing"), (20, "coarsening")]),
    "all is well": ([0, 1, 2, 0, 1], []),
}


@pytest.mark.parametrize(("codes", "expected"), PHASES.values(), ids=PHASES)
def test_a_phase_is_told_when_it_begins(codes: list[float], expected: list[Any]) -> None:
    assert told(series("mui/code/phase", codes)) == expected


def test_tasks_that_enter_a_phase_together_are_one_alert() -> None:
    (alert,) = alerts_at(5, {5: {"mui/a/phase": -2, "mui/phase": -2, "mui/b/phase": 1}}, None, AlertRule())
    assert (alert.title, alert.text) == (
        "MUI: collapsing",
        "a, all tasks pooled: performance and MUI both fall at step 5.",
    )


ALIVE = [0.0] * 5
DEAD_SHARES = {
    "appear": ([*ALIVE, 0, 0.05, 0.06, 0.2], [60]),
    "slowly": ([*ALIVE, 0, 0.01, 0.02, 0.03, 0.04], [80]),
    "less and more again": ([*ALIVE, 0.05, 0.015, 0.005, 0.05], [50, 80]),
    "waver at the edge": ([*ALIVE, 0.021, 0.019, 0.021, 0.019, 0.021], [50]),
    "were there before": ([0.3, 0.3, 0.28, 0.25, 0.2, 0.2, 0.2], []),
    "come back": ([0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.13], [60]),
    "are many while a router begins to learn": ([0, 0.19, 0.14, 0.05, 0.05, 0.03, 0.05, 0.03], []),
    "stay many": ([0, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6], [50]),
    "become fewer": ([0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2], []),
    "become fewer and more again": ([0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.6], [60]),
}


@pytest.mark.parametrize(("shares", "expected"), DEAD_SHARES.values(), ids=DEAD_SHARES)
def test_dead_experts_that_appear(shares: list[float], expected: list[int]) -> None:
    assert told(series(DEAD, shares)) == [(step, "dead_experts") for step in expected]


def test_dead_experts_are_told_with_where_they_were_fewest() -> None:
    (alert,) = alerts_at(60, series(DEAD, [0.1, 0.2, 0.0625, 0.07, 0.07, 0.07, 0.25]), None, AlertRule())
    assert alert.text == (
        "25.0% of the routed experts get no token of the probe set at step 60; at the fewest it was 6.2% (step 20)."
    )


def test_concentration_that_jumps_and_stays_is_told_once() -> None:
    before = [0.30, 0.301, 0.299, 0.302, 0.3, 0.298]
    assert told(series(GINI, [*before, 0.4, 0.4, 0.41, 0.4])) == [(60, "concentration")]
    assert told(series(GINI, [*before, 0.2])) == [(60, "concentration")]
    assert told(series(GINI, [*before, 0.315])) == []  # outside of its variation, but small
    assert told(series(GINI, [*before[:4], 0.4])) == []  # too few to know its variation
    assert told(series(GINI, [0.3, 0.2, 0.35, 0.25, 0.3, 0.2, 0.4])) == []  # inside of it


@settings(deadline=None)
@given(st.floats(-0.1, 0.1), st.floats(0, 1), st.integers(5, 40))
def test_a_steady_trend_is_no_jump(slope: float, start: float, n_points: int) -> None:
    assert told(series(GINI, [start + slope * number for number in range(n_points)])) == []


def test_jumps_in_noise_are_told_as_seldom_as_the_level_says() -> None:
    rng, n = np.random.default_rng(0), 4000
    rule = AlertRule(jump=0, level=0.95)
    false = 0
    for _ in range(n):
        values = list(rng.normal(0.5, 0.01, 11))
        false += bool(alerts_at(100, series(GINI, values), None, rule))
    assert false / n == pytest.approx(0.05, abs=4 * (0.05 * 0.95 / n) ** 0.5)


OVERHEADS = {
    "falls from its start": ([0.5, 0.25, 0.12, 0.06, 0.03, 0.015, 0.01], []),
    "stays above": ([0.5, 0.1, 0.05, 0.05, 0.05, 0.05], [40]),
    "a little above": ([0.012, 0.012, 0.012, 0.012], []),
    "again": ([0.05, 0.05, 0.05, 0.012, 0.009, 0.02, 0.03, 0.04], [20, 70]),
}


@pytest.mark.parametrize(("shares", "expected"), OVERHEADS.values(), ids=OVERHEADS)
def test_overhead_over_the_budget(shares: list[float], expected: list[int]) -> None:
    assert told(series(OVERHEAD, shares)) == [(step, "overhead") for step in expected]
    assert told(series(OVERHEAD, shares), budget=None) == []


def test_later_points_and_those_without_values_change_nothing() -> None:
    points = series(DEAD, [*ALIVE, 0, 0.05])
    assert alerts_at(60, {**points, 70: {DEAD: 0.0}, 5: {"mui/mui": 0.5}}, 0.01, AlertRule()) != ()
    assert alerts_at(7, points, 0.01, AlertRule()) == alerts_at(0, points, 0.01, AlertRule()) == ()


def test_only_so_many_an_hour(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    alerts = Alerts(AlertRule(per_hour=2), None, is_main=True)
    points = series("mui/phase", [-1, -2] * 3)
    with caplog.at_level(logging.WARNING):
        assert [len(alerts.at(step, points)) for step in points] == [1, 1, 0, 0, 0, 0]
        assert len(caplog.records) == 6  # the log has them all
        now[0] += 3601
        assert len(alerts.at(50, points)) == 1
    assert Alerts(False, None, is_main=True).at(0, points) == Alerts(True, None, is_main=False).at(0, points) == ()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 4}, "window: expected a number of points of at least 5, got 4"),
        ({"level": 1}, r"level: expected a number in \(0, 1\), got 1"),
        ({"dead": 2}, r"dead: expected a share in \[0, 1\], got 2"),
        ({"over": 0.5}, "over: expected a number of at least 1, got 0.5"),
    ],
)
def test_thresholds_out_of_their_range_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AlertRule(**options)
    with pytest.raises(TypeError, match=r"window: expected a whole number, got 10\.0"):
        AlertRule(window=10.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="alerts: expected True, False or an AlertRule, got 'yes'"):
        Asked(alerts="yes")


CALLED_SOON = {"every": 2, "phase_window": 3, "phase_level": 0.5, "rules": "top_fraction=0.05"}


def ruin(output_dir: Path, state: Any = None, until: int = 24, **options: Any) -> tuple[MemorySink, Any]:
    """Training with a learning rate that is far too high, so that tasks collapse; goes on from a state."""
    model, memory = make_model(), MemorySink()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    asked = {
        "every": 2,
        "phase_window": 3,
        "phase_level": 0.5,
        "rules": "top_fraction=0.05",
        "tracker": None,
        **options,
    }
    torch.manual_seed(0)
    loader = DataLoader(rows(), batch_size=4, shuffle=True)
    monitor = MUIMonitor(model, probe_set(), output_dir=output_dir, sinks=[memory], state=state, **asked)
    batches = [batch for _ in range(3) for batch in loader]
    for step, batch in enumerate(batches[:until], start=1):  # what was done before is done again, unobserved
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if state is None or step > state["step"]:
            monitor.step(step)
    kept = json.loads(json.dumps(monitor.state_dict()))
    monitor.close()
    return memory, kept


def entered(memory: MemorySink) -> list[tuple[int, str]]:
    """From the phases of each point: what was called, where something else was called before."""
    names = {-1.0: "coarsening", -2.0: "collapsing"}
    found: set[tuple[int, str]] = set()
    for key in ("mui/phase", "mui/a/phase", "mui/b/phase"):
        last = 0.0
        for point in memory.points:
            code = point.scalars.get(key, 0.0)
            if code in names and code != last:
                found.add((point.step, names[code]))
            last = code or last
    return sorted(found)


def alerts_of(memory: MemorySink) -> list[tuple[int, str]]:
    return [(alert.step, alert.kind) for point in memory.points for alert in point.alerts]


def test_a_task_that_collapses_or_coarsens_in_a_real_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        memory, _ = ruin(tmp_path)
    phases = [alert for alert in alerts_of(memory) if alert[1] in ("collapsing", "coarsening")]
    assert sorted(phases) == entered(memory)
    assert phases  # which of both it is depends on how the processor rounds
    logged = [record.getMessage() for record in caplog.records if record.name.startswith("mui_callback")]
    assert logged == [f"{alert.title}. {alert.text}" for point in memory.points for alert in point.alerts]
    lines = [json.loads(line) for line in (tmp_path / "mui.jsonl").read_text().splitlines()]
    assert [(one["step"], one["kind"]) for line in lines for one in line.get("alerts", [])] == alerts_of(memory)


@pytest.mark.parametrize("until", [9, 15, 21])
def test_what_was_told_before_a_pause_is_not_told_again(until: int, tmp_path: Path) -> None:
    whole, _ = ruin(tmp_path / "whole", at_end=False)
    first, state = ruin(tmp_path / "parts", until=until, at_end=False)
    second, _ = ruin(tmp_path / "parts", state, at_end=False)
    assert alerts_of(first) + alerts_of(second) == alerts_of(whole)
    assert alerts_of(ruin(tmp_path / "without", alerts=False, at_end=False)[0]) == []


def test_a_probe_that_keeps_failing_is_told_when_it_is_given_up(tmp_path: Path) -> None:
    model, memory = make_model(), MemorySink()
    options = {"tracker": None, "output_dir": tmp_path, "sinks": [memory], "every": 1}

    def fail(module: torch.nn.Module, args: Any) -> None:
        raise RuntimeError("injected")

    handle = model.model.layers[1].mlp.experts.register_forward_pre_hook(fail)
    with pytest.warns(UserWarning, match="injected"):
        monitor = MUIMonitor(model, probe_set(), **options)
    for step in (1, 2):
        with pytest.warns(UserWarning, match="injected"):
            monitor.step(step)
    handle.remove()
    monitor.step(3)
    monitor.close()
    assert alerts_of(memory) == [(2, "failure")]
    assert "injected" in memory.points[-1].alerts[0].text

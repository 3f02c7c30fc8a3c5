"""Which keys there are: few whatever the model, each of one row of the catalogue."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from made import LAYOUT, make_report
from mui_callback import MemorySink, MUIMonitor
from mui_callback.layout import ExpertLayout, LayerShape
from mui_callback.metrics.catalogue import CATALOGUE, MOST_LAYERS, Scope, key, layer_keys, metric_of
from mui_callback.monitoring.asked import Asked

SAMPLES = [{0, 1, 13}, {4, 24}, {1, 12}]


def test_every_key_is_of_the_row_that_it_is_made_from() -> None:
    for metric in CATALOGUE:
        name = metric.name.replace("<name>", "arc_easy/acc").replace("<rule>", "x").replace("<layer>", "L07")
        assert metric.scope is Scope.END or metric_of(key(name)) is metric
        if metric.scope.is_per_task:
            assert metric_of(key(name, "a task")) is metric
    for name in ("train/loss", "mui/nonsense", "mui/a/expert_gini", "mui/benchmark/", "mui/a/b/loss"):
        assert metric_of(name) is None, name


def test_each_layer_has_a_key_with_what_is_measured_inside_of_it() -> None:
    report = make_report(SAMPLES)
    plain, detailed = report.scalars(), report.scalars(detail="layers")
    of_layers = {name: value for name, value in detailed.items() if name not in plain}
    assert plain == {name: detailed[name] for name in plain}
    # Of 12 neurons in layer 1, three experts: 0, 1, 4. Of 14 in layer 4, four experts: 12, 13, 24; 24 is shared.
    assert of_layers["mui/layer_mui/L1"] == pytest.approx(3 / 12)
    assert of_layers["mui/layer_mui/L4"] == pytest.approx(3 / 14)
    assert "mui/layer_shared_share/L1" not in of_layers
    assert of_layers["mui/layer_shared_share/L4"] == pytest.approx(1 / 3)
    assert of_layers["mui/layer_expert_gini/L1"] == pytest.approx(4 / 9)  # of 0, 1, 2
    assert all(metric_of(name).scope is Scope.LAYER for name in of_layers)
    assert LAYOUT.layers[1].layer == 4


@pytest.mark.parametrize("n_layers", [1, 61, 64, 65, 300])
def test_a_model_of_many_layers_has_a_few_hundred_keys(n_layers: int) -> None:
    layout = ExpertLayout([LayerShape(number, "", 2, 1) for number in range(3, 3 + n_layers)])
    report = make_report([{0}, {1}], layout=layout, tasks=[0, 1], task_names=("a", "b", "c"))
    names = set(report.scalars(detail="layers"))
    assert len(names) <= 60 + 4 * 64
    last = f"mui/layer_mui/L{n_layers + 2}"
    assert {f"mui/layer_mui/L{3:0{len(str(n_layers + 2))}}", last} <= names


@given(st.lists(st.integers(0, 500), max_size=200))
def test_keys_of_layers_are_few_different_and_in_order(layers: Sequence[int]) -> None:
    layers = sorted(layers)
    keys = layer_keys("layer_mui/<layer>", layers)
    assert len(set(keys.values())) == len(keys) == min(len(layers), MOST_LAYERS)
    assert list(keys) == sorted(keys)
    assert list(keys.values()) == sorted(keys.values())
    if layers:
        assert {0, len(layers) - 1} <= set(keys)
        is_named = len(set(layers)) == len(layers)
        assert int(keys[0].rpartition("L")[2]) == (layers[0] if is_named else 0)


def test_a_monitor_logs_layers_where_that_is_asked_for(tmp_path: object) -> None:
    from integrations import make_model, probe_set

    memory = MemorySink()
    options = {"tracker": None, "output_dir": tmp_path, "sinks": [memory]}
    MUIMonitor(make_model(), probe_set(), detail="layers", **options).close()
    MUIMonitor(make_model(), probe_set(), **options).close()
    detailed, plain = (point.scalars for point in memory.points)
    assert {"mui/layer_mui/L0", "mui/layer_dead_experts/L1"} <= detailed.keys() - plain.keys()
    with pytest.raises(ValueError, match="detail: expected 'model' or 'layers', got 'experts'"):
        Asked(detail="experts")

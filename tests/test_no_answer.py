"""What has no answer is None in a report and left out of what is logged; it is never NaN and never an error."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from made import LAYOUT, make_report
from mui_callback import MUIProbe, MUIReport, ProbeSet
from mui_callback.metrics.catalogue import CATALOGUE, Scope
from mui_callback.sample_results import ESTIMATED
from mui_callback.task_report import TaskReport
from plain_moe import build_plain
from tiny import build
from tiny_samples import make_samples

OF_TASK = [metric.name for metric in CATALOGUE if metric.scope in (Scope.TASK, Scope.POOLED, Scope.REPORT)]
IS_END = ("_low", "_high")


def metrics(task: TaskReport) -> dict[str, Any]:
    return {name: getattr(task, name) for name in OF_TASK if not name.endswith(IS_END)}


def everything(report: MUIReport) -> Iterator[tuple[str, float | None]]:
    """Every metric of every task, layer and rule, every interval, and what is logged."""
    for rule in report.rules:
        one = report.under(rule)
        for name, task in {"pooled": one.pooled, **one.tasks}.items():
            for where, part in [("", task), *((f" layer {n}", layer) for n, layer in enumerate(task.layers))]:
                for metric, value in metrics(part).items():
                    yield f"{rule} {name}{where} {metric}", value
                for label, frequency, mui in part.top_experts():
                    yield f"{name}{where} {label}", frequency + mui
        for task_name in (None, *one.task_names):
            for metric, interval in one.intervals(task_name).items():
                for end in () if interval is None else (interval.low, interval.high):
                    yield f"{rule} {task_name} interval of {metric}", end
        for column in one.samples.columns:
            for value in column.to_pylist():
                yield "samples", value if isinstance(value, float) else None
        yield from one.scalars().items()


def assert_nothing_is_nan(report: MUIReport) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for where, value in everything(report):
            assert value is None or math.isfinite(value), where
    assert all(isinstance(value, float) for value in report.scalars().values())


def test_a_task_without_samples() -> None:
    report = make_report([{0}, {1, 25}], [0, 0])
    assert_nothing_is_nan(report)
    assert set(metrics(report.tasks["b"]).values()) == {None}
    assert set(report.intervals("b").values()) == {None}
    assert not [name for name in report.scalars() if name.startswith("mui/b/")]
    assert report.pooled.mui == report.tasks["a"].mui


def test_no_samples_at_all() -> None:
    report = make_report([])
    assert_nothing_is_nan(report)
    assert set(report.scalars()) <= {f"mui/{metric.name}" for metric in CATALOGUE if metric.scope is Scope.PROBE}
    assert report.key_neuron_sets().shape == (0, LAYOUT.n_neurons)


def test_a_task_whose_samples_have_no_response_token() -> None:
    n_tokens = np.array([4, 0, 0])
    report = make_report(
        [{0}, set(), set()],
        [0, 1, 1],
        table={"n_tokens": n_tokens, "n_bytes": n_tokens},
        loss=n_tokens * 2.0,
        correct=n_tokens // 2,
        sample_mass=np.ones((3, 2)) * (n_tokens > 0)[:, None],
        mass=np.array([[1.0] * 7, [0.0] * 7]),
        routed=np.array([[4] * 7, [0] * 7]),
    )
    assert_nothing_is_nan(report)
    assert set(metrics(report.tasks["b"]).values()) == {None}
    assert set(report.intervals("b").values()) == {None}
    assert report.unscored == 2


def test_one_sample_has_values_but_no_intervals() -> None:
    report = make_report([{0, 25}, {1}, {2}], [0, 1, 1])
    assert_nothing_is_nan(report)
    scalars = report.scalars()
    assert scalars["mui/a/mui"] == 2 / 26
    assert set(report.intervals("a").values()) == {None}
    assert not [name for name in scalars if name.startswith("mui/a/") and name.endswith(IS_END)]


def test_samples_that_all_add_the_same_have_no_interval() -> None:
    report = make_report([{0}, {1}, {2}])
    assert report.intervals() == dict.fromkeys(ESTIMATED)
    assert report.pooled.mui == 3 / 26


def test_a_layer_that_no_token_reaches() -> None:
    """Its experts are never routed to; the rest of the model is measured."""
    in_first = LAYOUT.layer_of_expert == 0
    report = make_report(
        [{0, 1}, {5}], mass=np.stack([in_first * 1.0, in_first * 0.0]), routed=np.stack([in_first * 9, in_first * 0])
    )
    assert_nothing_is_nan(report)
    first, second = report.pooled.layers
    assert first.mui == 3 / 12
    predicted = {"loss", "bits_per_byte", "token_accuracy", "dead_experts"}
    assert {name for name, value in metrics(second).items() if value is not None} == predicted
    assert second.dead_experts == 1
    assert report.pooled.layer_mui == (3 / 12, None)
    assert report.pooled.dead_experts == 2 / 5
    assert report.pooled.router_entropy == first.router_entropy == pytest.approx(1)  # of the layers that route


def test_a_layer_without_key_neurons_that_is_reached_has_a_mui_of_zero() -> None:
    """As ``global_topk`` may find it."""
    report = make_report([{0}, {1}])
    assert report.pooled.layer_mui == (2 / 12, 0.0)
    assert_nothing_is_nan(report)


def test_losses_and_masses_that_are_not_finite() -> None:
    report = make_report(
        [{0}, {1}, {2, 3}],
        [0, 0, 1],
        loss=np.array([np.nan, 3.0, 2.0]),
        mass=np.array([[np.nan] * 7, [1.0] * 7]),
        sample_mass=np.array([[np.inf, 1.0], [1.0, np.nan], [1.0, 1.0]]),
        identity_error=np.array([np.nan, np.nan]),
    )
    assert_nothing_is_nan(report)
    assert report.pooled.loss is None
    assert report.tasks["b"].loss == 0.5
    assert report.pooled.shared_mass_share is None
    assert report.intervals()["loss"] is None
    assert report.broken_samples == 1
    assert report.identity_error is None


def test_a_loss_that_is_not_finite_spoils_no_bits_per_byte_that_it_is_not_in() -> None:
    report = make_report([{0}, {1}, {2}], loss=np.array([np.inf, 3.0, 2.0]), table={"n_bytes": np.array([-1, 4, 4])})
    assert_nothing_is_nan(report)
    found = report.estimate("bits_per_byte")
    assert found is not None
    assert found.value == pytest.approx(report.pooled.bits_per_byte) == pytest.approx(5 / 8 / math.log(2))
    assert report.estimate("loss") is None


def test_dropped_tokens_are_of_the_layers_with_a_capacity() -> None:
    report = make_report([{0}], dropped=np.array([3, 0]), assigned=np.array([12, 0]))
    assert report.dropped_tokens == 0.25
    assert report.layer_dropped_tokens == (0.25, None)
    assert make_report([{0}]).dropped_tokens is None


# Models


@pytest.fixture(scope="module")
def probe_set() -> ProbeSet:
    return ProbeSet({"a": make_samples(1), "one": make_samples(2)[:1]})


RULES = ("top_fraction=0.1", "topscore=0.5", "global_topk=5")


def test_a_model_with_weights_that_are_not_finite(probe_set: ProbeSet) -> None:
    model = build("qwen2_moe")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2] = float("nan")
    report = MUIProbe(model, probe_set, rules=RULES).measure()
    assert report.not_finite > 0
    assert_nothing_is_nan(report)


def test_a_model_of_which_nothing_is_finite(probe_set: ProbeSet) -> None:
    model = build("qwen2_moe")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    report = MUIProbe(model, probe_set, rules=RULES).measure()
    assert_nothing_is_nan(report)
    assert report.key_neurons() == frozenset()
    assert report.mui is None
    assert "mui/loss" not in report.scalars()


class RoutesTo(nn.Module):
    """A router that sends every token to the first two experts, with equal weights."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router

    def forward(self, x: torch.Tensor) -> Any:
        logits, weights, index = self.router(x)
        index = torch.arange(2).expand_as(index)
        return logits, torch.full_like(weights, 0.5), index


def test_experts_that_are_never_routed_to(probe_set: ProbeSet) -> None:
    model = build("olmoe")
    for layer in model.model.layers:
        layer.mlp.gate = RoutesTo(layer.mlp.gate)
    report = MUIProbe(model, probe_set, rules=RULES).measure()
    assert_nothing_is_nan(report)
    tokens = report.tokens
    assert report.pooled.routed.tolist() == [tokens, tokens, 0, 0, 0, 0] * 2
    assert report.pooled.dead_experts == 4 / 6
    assert report.pooled.load_max_ratio == 3
    assert report.pooled.load_variation == pytest.approx(math.sqrt(2))
    assert report.pooled.router_entropy == pytest.approx(math.log(2) / math.log(6))
    assert report.pooled.mass.reshape(2, 6)[:, 2:].sum() == 0
    assert {neuron.expert for neuron in report.key_neurons()} <= {"E0", "E1"}


def test_a_model_whose_layers_no_token_reaches(probe_set: ProbeSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plain_moe.CAPACITY", 0)
    report = MUIProbe(build_plain("moduledict"), probe_set, rules=RULES, max_length=512).measure()
    assert_nothing_is_nan(report)
    assert report.mui is None
    assert set(report.pooled.layer_mui) == {None}
    assert report.pooled.dead_experts == 1
    assert report.pooled.router_entropy is None
    assert "mui/loss" in report.scalars()

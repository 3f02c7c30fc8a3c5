"""Metrics from counts, against definitions written out one term at a time."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from mui_callback.layout import ExpertLayout, LayerShape
from mui_callback.metrics import concentration, performance, routing, utilization
from mui_callback.metrics.performance import PredictionSums
from mui_callback.task_report import TaskReport

amounts = st.lists(st.integers(0, 1000), min_size=1, max_size=12).map(np.array)
some = amounts.filter(lambda a: a.sum() > 0)


@given(some)
def test_gini_is_the_mean_absolute_difference(amount: np.ndarray) -> None:
    n, values = len(amount), amount.tolist()
    mean_difference = sum(abs(a - b) for a, b in itertools.product(values, values)) / n**2
    assert concentration.gini(amount) == pytest.approx(mean_difference / (2 * sum(values) / n), abs=1e-12)


@given(some)
def test_entropy_terms(amount: np.ndarray) -> None:
    shares = [value / amount.sum() for value in amount.tolist() if value]
    h = sum(share * math.log(1 / share) for share in shares)
    assert concentration.entropy(amount) == pytest.approx(h, abs=1e-12)
    assert concentration.effective_experts(amount) == pytest.approx(math.exp(h))
    assert concentration.expert_diversity(amount) == pytest.approx(math.exp(h) / len(amount))
    if len(amount) > 1:
        assert concentration.normalized_entropy(amount) == pytest.approx(h / math.log(len(amount)), abs=1e-12)


@given(some, st.integers(2, 5))
def test_concentration_does_not_depend_on_unit_or_order(amount: np.ndarray, factor: int) -> None:
    for function in (concentration.gini, concentration.entropy, concentration.top_share):
        assert function(amount * factor) == pytest.approx(function(amount), abs=1e-12)
        assert function(amount[::-1]) == pytest.approx(function(amount), abs=1e-12)


def test_concentration_at_its_ends() -> None:
    equal, one = np.full(20, 7), np.eye(20, dtype=int)[3] * 5
    assert concentration.gini(equal) == pytest.approx(0)
    assert concentration.gini(one) == pytest.approx(1 - 1 / 20)
    assert concentration.normalized_entropy(equal) == pytest.approx(1)
    assert concentration.effective_experts(one) == pytest.approx(1)
    assert concentration.top_share(equal) == pytest.approx(0.5)
    for function in (concentration.gini, concentration.effective_experts, concentration.top_share):
        assert function(np.zeros(4)) is None
    assert concentration.normalized_entropy(np.array([3])) is None  # one expert: nothing to concentrate


@given(some)
def test_the_load_of_experts_is_that_of_their_definitions(tokens: np.ndarray) -> None:
    mean = sum(tokens.tolist()) / len(tokens)
    assert routing.load_max_ratio(tokens) == pytest.approx(max(tokens.tolist()) / mean)
    assert routing.load_variation(tokens) == pytest.approx(statistics.pstdev(tokens.tolist()) / mean)


def test_the_load_at_its_ends() -> None:
    equal, one, none = np.full(8, 3), np.eye(8, dtype=int)[2] * 7, np.zeros(8, dtype=int)
    assert (routing.load_max_ratio(equal), routing.load_variation(equal)) == (1, 0)
    assert routing.router_entropy(equal) == pytest.approx(1)
    assert (routing.load_max_ratio(one), routing.router_entropy(one)) == (8, 0)
    assert routing.load_variation(one) == pytest.approx(math.sqrt(7))
    assert routing.router_entropy(np.array([5])) is None  # one expert: no choice
    for function in (routing.load_max_ratio, routing.load_variation, routing.router_entropy):
        assert function(none) is None
        assert function(none[:0]) is None


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_the_rank_correlation_is_scipys(pairs: list[tuple[int, int]]) -> None:
    first, second = (np.array([pair[i] for pair in pairs], dtype=np.int64) for i in (0, 1))
    found = routing.rank_correlation(first, second)
    if len(set(first.tolist())) < 2 or len(set(second.tolist())) < 2:
        assert found is None
    else:
        assert found == pytest.approx(spearmanr(first, second).statistic)


def test_ratio_has_no_answer_without_a_whole() -> None:
    assert utilization.ratio(1, 0) is None
    assert utilization.ratio(float("nan"), 1) is None
    assert utilization.ratio(1, 4) == 0.25


@pytest.fixture
def task() -> TaskReport:
    """Two layers: three routed experts of width 10, then two routed of 10 and two shared of 10 and 5."""
    layout = ExpertLayout([LayerShape(1, "a", 3, 10), LayerShape(4, "b", 2, 10, (10, 5))])
    return TaskReport(
        layout=layout,
        n_samples=5,
        key_neurons=np.array([1, 0, 2, 3, 0, 9, 5]),
        activated=np.array([3, 0, 2, 3, 0, 5, 5]),
        mass=np.array([1.0, 0.0, 1.0, 2.0, 0.0, 3.0, 3.0]),
        routed=np.array([4, 0, 6, 5, 5, 10, 10]),
        predictions=PredictionSums(30.0, 20, 5, 12.0, 8, 4, 3),
        key_expert_frequency=0.6,
    )


def test_task_metrics_by_hand(task: TaskReport) -> None:
    assert task.layout.expert_labels == ("L1-E0", "L1-E1", "L1-E2", "L4-E0", "L4-E1", "L4-S1", "L4-S2")
    assert task.mui == 20 / 65
    assert task.layer_mui == (3 / 30, 17 / 35)
    assert task.expert_mui.tolist() == [0.1, 0.0, 0.2, 0.3, 0.0, 0.9, 1.0]
    assert task.activated_frequency.tolist() == [0.6, 0.0, 0.4, 0.6, 0.0, 1.0, 1.0]
    assert task.key_experts.tolist() == [True, False, False, True, False, True, True]
    assert task.key_expert_proportion == 4 / 7
    assert task.key_expert_mui == pytest.approx((0.1 + 0.3 + 0.9 + 1.0) / 4)
    assert task.shared_share == 14 / 20
    assert task.shared_mass_share == 6 / 10
    assert task.shared_in_top10 == 2
    assert task.shared_fair_ratio == pytest.approx((14 / 20) / (15 / 65))
    assert task.dead_experts == 1 / 5
    assert task.load_max_ratio == pytest.approx((6 / (10 / 3) + 1) / 2)  # mean of two layers
    assert task.load_variation == pytest.approx((statistics.pstdev([4, 0, 6]) / (10 / 3) + 0) / 2)
    first = (0.4 * math.log(1 / 0.4) + 0.6 * math.log(1 / 0.6)) / math.log(3)
    assert task.router_entropy == pytest.approx((first + 1) / 2)
    # routed to 4 0 6 5 5, ranks 2 1 5 3.5 3.5; activated in 3 0 2 3 0 samples, ranks 4.5 1.5 3 4.5 1.5
    assert task.routing_rank_correlation == pytest.approx(1.5 / math.sqrt(9.5 * 9))
    assert task.loss == 1.5
    assert task.token_accuracy == 0.25
    assert task.choice_accuracy == 0.75
    assert task.bits_per_byte == pytest.approx(12 / math.log(2) / 8)
    assert task.top_experts(3) == [("L4-S2", 1.0, 1.0), ("L4-S1", 1.0, 0.9), ("L4-E0", 0.6, 0.3)]
    assert [label for label, _, _ in task.top_experts(5)][3:] == ["L1-E0", "L1-E2"]  # frequency before expert MUI


def test_a_layer_has_the_same_metrics(task: TaskReport) -> None:
    first, second = task.layers
    assert (first.mui, second.mui) == (3 / 30, 17 / 35)
    assert first.shared_share is None
    assert second.shared_share == 14 / 17
    assert second.expert_gini == concentration.gini(np.array([3, 0, 9, 5]))
    assert first.router_entropy == routing.router_entropy(np.array([4, 0, 6]))
    assert first.routing_rank_correlation == routing.rank_correlation(np.array([4, 0, 6]), np.array([3, 0, 2]))
    assert second.routing_rank_correlation is None  # both experts have 5 tokens
    assert first.mass_gini == concentration.gini(np.array([1, 0, 1]))
    assert second.mass_diversity == concentration.expert_diversity(np.array([2, 0, 3, 3]))
    assert second.top_experts(1) == [("L4-S2", 1.0, 1.0)]


def test_choice_accuracy_divides_by_length() -> None:
    # sample 0: the second choice is less likely but twice as long; sample 2 has no choices; 3: a tie, first wins
    has, right = performance.choice_is_right(
        loss_C=np.array([4.0, 6.0, 1.0, 2.0, 3.0, 3.0]),
        length_C=np.array([4, 8, 1, 1, 2, 2]),
        sample_C=np.array([0, 0, 1, 1, 3, 3]),
        answer_N=np.array([1, 1, -1, 0]),
    )
    assert has.tolist() == [True, True, False, True]
    assert right.tolist() == [True, False, False, True]


def test_neuron_names_cover_every_neuron_once() -> None:
    layout = ExpertLayout([LayerShape(0, "a", 2, 3), LayerShape(7, "b", 1, 2, (2, 2))])
    names = [layout.name_neuron(n) for n in range(layout.n_neurons)]
    assert len(set(names)) == layout.n_neurons == 12
    assert names[5] == (0, "E1", 2)
    assert names[6] == (7, "E0", 0)
    assert names[-1] == (7, "S2", 1)

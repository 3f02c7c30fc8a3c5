"""Rarefaction, Chao2, comparison and greedy coverage, against brute force, plain loops and simulations.

Shapes: N samples, J neurons, R repetitions of a simulation.
"""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.stats import ttest_ind

from mui_callback.metrics.diversity import IntervalEstimate, chao2, common_size, compare
from mui_callback.metrics.max_coverage import greedy_max_coverage
from mui_callback.metrics.rarefaction import coverage_curve, expected_union

N_NEURONS = 12
sets = st.lists(st.sets(st.integers(0, N_NEURONS - 1), max_size=6), min_size=1, max_size=6)


def matrix(samples: list[set[int]], n_neurons: int = N_NEURONS) -> csr_array:
    rows = [sorted(sample, reverse=True) for sample in samples]  # columns come in any order
    ends = np.cumsum([0, *map(len, rows)])
    columns = np.array([column for row in rows for column in row], dtype=np.int32)
    return csr_array((np.ones(len(columns), np.uint8), columns, ends), shape=(len(rows), n_neurons))


def of_all(samples: list[set[int]]) -> np.ndarray:
    return np.arange(1, len(samples) + 1)


def union(samples: list[set[int]]) -> int:
    return len(set().union(*samples))


def mean_union(samples: list[set[int]], m: int) -> float:
    """Over all choices of m samples, one by one."""
    unions = [union(list(chosen)) for chosen in combinations(samples, m)]
    return sum(unions) / len(unions)


def without(samples: list[set[int]]) -> list[list[set[int]]]:
    return [samples[:i] + samples[i + 1 :] for i in range(len(samples))]


def jackknife(values: list[float]) -> float:
    n = len(values)
    return math.sqrt((n - 1) / n * sum((value - sum(values) / n) ** 2 for value in values))


@given(sets)
@settings(deadline=None)
def test_the_curve_is_the_mean_over_all_choices(samples: list[set[int]]) -> None:
    curve = coverage_curve(matrix(samples), of_all(samples))
    expected = [mean_union(samples, m) / N_NEURONS for m in of_all(samples)]
    assert curve.mui == pytest.approx(expected, abs=1e-12)
    assert curve.n_samples == len(samples)


@given(sets.filter(lambda samples: len(samples) > 1), st.sampled_from([0.5, 0.95]))
@settings(deadline=None)
def test_its_error_is_the_jackknife_of_rarefied_curves(samples: list[set[int]], level: float) -> None:
    n = len(samples)
    curve = coverage_curve(matrix(samples), of_all(samples), level=level)
    expected = [jackknife([mean_union(rest, m) for rest in without(samples)]) / N_NEURONS for m in range(1, n)]
    own = [float(union(samples) - union(rest)) for rest in without(samples)]
    assert curve.error is not None
    assert curve.low is not None
    assert curve.high is not None
    assert curve.error == pytest.approx([*expected, n / (n - 1) * jackknife(own) / N_NEURONS], abs=1e-12)
    t = {0.5: (1, 0.816497, 0.764892, 0.740697, 0.726687), 0.95: (12.706205, 4.302653, 3.182446, 2.776445, 2.570582)}
    half = t[level][n - 2] * curve.error
    assert curve.low == pytest.approx(np.maximum(curve.mui - half, 0), abs=1e-6)
    assert curve.high == pytest.approx(np.minimum(curve.mui + half, 1), abs=1e-6)


def test_a_curve_at_some_sizes_is_that_part_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    samples = [set(rng.choice(5000, 30).tolist()) for _ in range(600)]
    whole = coverage_curve(matrix(samples, 5000), of_all(samples))
    some = np.array([1, 255, 256, 257, 600])
    part = coverage_curve(matrix(samples, 5000), some)
    assert part.mui.tolist() == whole.mui[some - 1].tolist()
    assert part.error is not None
    assert whole.error is not None
    assert part.error == pytest.approx(whole.error[some - 1], rel=1e-9)
    assert whole.mui[-1] == union(samples) / 5000
    assert (np.diff(whole.mui) > 0).all()


@pytest.mark.parametrize("n", [40, 6000])
def test_rarefaction_is_exact_for_thousands_of_samples(n: int) -> None:
    sizes = np.array([0, 1, 2, n // 3, n - 1, n])
    for count in (1, 2, 17, n - 1, n):
        expected = [1 - Fraction(math.comb(n - count, m), math.comb(n, m)) for m in sizes.tolist()]
        assert expected_union(np.array([count]), n, sizes) == pytest.approx([float(e) for e in expected], rel=1e-10)


def test_one_sample_has_a_point_and_no_interval() -> None:
    curve = coverage_curve(matrix([{1, 2, 3}]), np.array([1]))
    assert curve.mui.tolist() == [0.25]
    assert curve.error is curve.low is curve.high is None
    assert chao2(matrix([{1, 2, 3}])) is None


def test_samples_without_tokens_count_as_samples() -> None:
    curve = coverage_curve(matrix([{0}, set(), set()]), np.array([1, 2, 3]))
    assert curve.mui * N_NEURONS == pytest.approx([1 / 3, 2 / 3, 1])
    nothing = coverage_curve(matrix([set(), set()]), np.array([1, 2]))
    assert nothing.mui.tolist() == [0, 0]
    assert nothing.error is not None
    assert nothing.error.tolist() == [0, 0]
    assert chao2(matrix([set(), set()])) == IntervalEstimate(0.0, None, None)


def test_the_key_neurons_are_left_as_they_are() -> None:
    given_sets = matrix([{0, 1, 5, 6, 7}, set(), {1, 5}, {5}])
    before = given_sets.copy()
    coverage_curve(given_sets, np.arange(1, 5))
    chao2(given_sets)
    greedy_max_coverage(given_sets, np.array([0, 0, 1, 1]), 2)
    for name in ("data", "indices", "indptr"):
        assert getattr(given_sets, name).tolist() == getattr(before, name).tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: coverage_curve(x, np.array([0])), "expected numbers from 1 to the 2 samples, got [0]"),
        (lambda x: coverage_curve(x, np.array([3])), "expected numbers from 1 to the 2 samples, got [3]"),
        (lambda x: coverage_curve(x, np.array([1]), level=95), "level: expected a number in (0, 1), got 95"),
        (lambda x: chao2(x, level=1.0), "level: expected a number in (0, 1), got 1.0"),
        (lambda x: coverage_curve(x[:0], np.array([])), "expected one or more samples and neurons, got the shape (0,"),
        (lambda x: compare({"a": x, "b": x[:, :3]}), "different numbers of neurons (a: 12, b: 3)"),
        (lambda x: compare({}), "expected one or more data sets, got none"),
        (lambda x: compare({"a": x, "b": x[:1]}, size=2), "from 1 to 1, which is all that 'b' has, got 2"),
        (lambda x: compare({"a": x}, size=0), "from 1 to 2, which is all that 'a' has, got 0"),
        (lambda x: greedy_max_coverage(x, np.array([0, 0]), 3), "size: expected a number from 1 to the 2 samples, got"),
        (lambda x: greedy_max_coverage(x, np.array([0, 0]), 0), "size: expected a number from 1 to the 2 samples, got"),
        (lambda x: greedy_max_coverage(x, np.array([0]), 1), "expected the task of each of the 2 samples"),
        (lambda x: greedy_max_coverage(x * 0 > 0, np.array([0, 0]), 1), "but none of 2 has one"),
    ],
)
def test_what_cannot_be_answered_is_said(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as raised:
        call(matrix([{0, 1}, {1}]))  # type: ignore[operator]
    assert message in str(raised.value)


# Chao2


def chao2_by_hand(samples: list[set[int]]) -> tuple[int, float]:
    """What was seen, and the estimate of what was not."""
    n, counts = len(samples), [sum(j in sample for sample in samples) for j in range(N_NEURONS)]
    q1, q2 = counts.count(1), counts.count(2)
    unseen = q1 * (q1 - 1) / (2 * (q2 + 1)) if q2 == 0 else q1**2 / (2 * q2)
    return union(samples), unseen * (n - 1) / n


@given(sets.filter(lambda samples: len(samples) > 1))
def test_chao2_is_the_formula_and_its_error_the_jackknife(samples: list[set[int]]) -> None:
    found = chao2(matrix(samples))
    assert found is not None
    seen, unseen = chao2_by_hand(samples)
    assert found.value == pytest.approx(min(seen + unseen, N_NEURONS) / N_NEURONS)
    if unseen == 0:
        assert found.low is found.high is None
        return
    error = jackknife([sum(chao2_by_hand(rest)) for rest in without(samples)])
    factor = math.exp(1.959963985 * math.sqrt(math.log(1 + (error / unseen) ** 2)))
    assert found.low == pytest.approx(min(seen + unseen / factor, N_NEURONS) / N_NEURONS)
    assert found.high == pytest.approx(min(seen + unseen * factor, N_NEURONS) / N_NEURONS)


def test_chao2_by_hand() -> None:
    # Q1 = 3 (neurons 0, 1, 2), Q2 = 1 (neuron 3), n = 4: 5 seen and 3/4 · 9/2 more
    found = chao2(matrix([{0, 3, 4}, {1, 3, 4}, {2, 4}, {4}], 100))
    assert found is not None
    assert found.value == pytest.approx((5 + 3.375) / 100)
    # Q1 = 3, Q2 = 0: 4 seen and 3/4 · 3 · 2 / 2 more
    bias_corrected = chao2(matrix([{0, 4}, {1, 4}, {2, 4}, {4}], 100))
    assert bias_corrected is not None
    assert bias_corrected.value == pytest.approx((4 + 2.25) / 100)
    assert chao2(matrix([{0, 1}, {0, 1}, {0, 1}])) == IntervalEstimate(2 / N_NEURONS, None, None)


# Simulations


def topics(rng: np.random.Generator, chance_TJ: np.ndarray, share_T: np.ndarray, n: int) -> csr_array:
    """Samples of topics that each need neurons of their own, so that neurons come together."""
    topic_N = rng.choice(len(share_T), n, p=share_T)
    return csr_array((rng.random((n, chance_TJ.shape[1])) < chance_TJ[topic_N]).astype(np.uint8))


def a_world(seed: int, n_topics: int = 6, n_neurons: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """How likely a sample of each topic has each neuron, and the share of each topic."""
    rng = np.random.default_rng(seed)
    chance_TJ = np.stack([rng.permutation(0.5 / np.arange(1, n_neurons + 1) ** 0.8) for _ in range(n_topics)])
    share_T = 1.0 / np.arange(1, n_topics + 1)
    return chance_TJ, share_T / share_T.sum()


def apart() -> tuple[np.ndarray, np.ndarray]:
    """The same of eight topics that share no neuron."""
    return np.kron(np.eye(8), 0.5 / np.arange(1, 61) ** 0.8), np.array([0.3, 0.2, 0.15, 0.12, 0.1, 0.07, 0.04, 0.02])


@pytest.mark.parametrize("n", [6, 30])
def test_the_interval_has_the_expected_mui_as_often_as_it_says(n: int) -> None:
    chance_TJ, share_T = a_world(0)
    sizes = np.unique([1, 2, n // 2, n - 1, n])
    truth = (1 - (1 - share_T @ chance_TJ) ** sizes[:, None]).mean(axis=1)
    rng = np.random.default_rng(1)
    inside_RM, mui_RM, variance_RM = [], [], []
    for _ in range(400):
        curve = coverage_curve(topics(rng, chance_TJ, share_T, n), sizes)
        assert curve.error is not None
        assert curve.low is not None
        assert curve.high is not None
        inside_RM.append((curve.low <= truth) & (truth <= curve.high))
        mui_RM.append(curve.mui)
        variance_RM.append(curve.error**2)
    spread = np.std(mui_RM, axis=0)
    assert np.mean(mui_RM, axis=0) == pytest.approx(truth, abs=4 * spread.max() / 20)
    # At 95 %, 400 repetitions of an exact interval are inside 92 to 98 % of the time.
    assert (np.mean(inside_RM, axis=0) > 0.91).all()
    ratio = np.sqrt(np.mean(variance_RM, axis=0)) / spread
    assert ((ratio > 0.9) & (ratio < 1.25)).all()  # 1 at small sizes, above it near n


def test_the_interval_of_the_total_holds_though_neurons_come_together() -> None:
    chance_TJ, share_T = apart()
    rng = np.random.default_rng(2)
    found = [chao2(topics(rng, chance_TJ, share_T, 30)) for _ in range(300)]
    totals = [one for one in found if one is not None and one.low is not None and one.high is not None]
    assert len(totals) == len(found)
    mean = float(np.mean([one.value for one in totals]))
    assert mean < 1  # a lower bound of the 480 neurons, all of which are reached in the end
    assert np.mean([one.low <= mean <= one.high for one in totals]) > 0.93
    assert np.mean([one.high < 1 for one in totals]) > 0.1


@pytest.mark.parametrize("n_sets", [2, 4])
def test_data_of_one_kind_rarely_differs_however_many_sets(n_sets: int) -> None:
    chance_TJ, share_T = a_world(0)
    rng = np.random.default_rng(3)
    wrong = 0
    for _ in range(300):
        drawn = {str(i): topics(rng, chance_TJ, share_T, 10 + 5 * i) for i in range(n_sets)}
        wrong += any(difference.is_clear for difference in compare(drawn).differences)
    assert wrong / 300 < 0.09  # 5 % is meant; 300 repetitions of it are below 9 %


# Comparison


def test_data_of_more_topics_is_more_diverse() -> None:
    chance_TJ, share_T = apart()
    rng = np.random.default_rng(4)
    many, few = topics(rng, chance_TJ, share_T, 60), topics(rng, chance_TJ[:1], np.ones(1), 40)
    compared = compare({"few": few, "many": many})
    assert compared.size == 40
    (difference,) = compared.differences
    assert (difference.first, difference.second) == ("few", "many")
    assert difference.is_clear
    assert difference.mui.high is not None
    assert difference.mui.high < 0
    assert difference.mui.value == pytest.approx(compared.mui["few"].value - compared.mui["many"].value)
    curve = coverage_curve(many, np.array([40]))
    assert curve.low is not None
    assert (compared.mui["many"].value, compared.mui["many"].low) == (curve.mui[0], curve.low[0])


def test_the_interval_of_a_difference_is_welchs() -> None:
    """At one sample MUI is the mean size of a set, for which there is the textbook's formula."""
    a, b = [{0, 1, 2}, {0, 1, 2, 3}, {5}], [{0, 1}, {4, 5, 6, 7, 8}, {1}, {0, 1, 2, 3, 4}]
    compared = compare({"a": matrix(a), "b": matrix(b)}, size=1, level=0.9)
    (difference,) = compared.differences
    assert difference.mui.value == pytest.approx((8 / 3 - 13 / 4) / N_NEURONS)
    ends = ttest_ind([len(s) for s in a], [len(s) for s in b], equal_var=False).confidence_interval(0.9)
    assert difference.mui.low == pytest.approx(ends.low / N_NEURONS)
    assert difference.mui.high == pytest.approx(ends.high / N_NEURONS)
    assert difference.is_clear is False


def test_three_data_sets_share_the_level() -> None:
    rng = np.random.default_rng(5)
    drawn = {name: topics(rng, *a_world(0), 12) for name in "abc"}
    three, two = compare(drawn, level=0.94), compare({"a": drawn["a"], "b": drawn["b"]}, level=0.98)
    assert [(d.first, d.second) for d in three.differences] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert three.differences[0].mui.high == pytest.approx(two.differences[0].mui.high)


@given(st.integers(2, 8), st.integers(2, 8), st.randoms(use_true_random=False))
def test_sets_of_equal_size_do_not_differ_by_rounding(n_first: int, n_second: int, random: Random) -> None:
    """The mean size of the sets is the same, and there is no spread that would hide what the last digits say."""
    first, second = ([set(random.sample(range(N_NEURONS), 3)) for _ in range(n)] for n in (n_first, n_second))
    (difference,) = compare({"a": matrix(first), "b": matrix(second)}, size=1).differences
    assert difference.is_clear is False
    (other,) = compare({"a": matrix(first), "b": matrix([{0, 1}] * n_second)}, size=1).differences
    assert other.is_clear


def test_a_data_set_of_one_sample_cannot_be_told_from_others() -> None:
    compared = compare({"a": matrix([{0}]), "b": matrix([{0, 1}, {2}])})
    assert compared.size == 1
    assert compared.mui["a"] == IntervalEstimate(1 / N_NEURONS, None, None)
    assert compared.differences[0].is_clear is None
    assert compare({"a": matrix([{0}])}).differences == ()


def test_the_common_size_is_the_smallest_ones() -> None:
    assert common_size({"a": 5, "b": 3}) == 3
    assert common_size({"a": 5, "b": 3}, 2) == 2


# Greedy maximum coverage

tasks_and_sets = st.lists(st.tuples(st.integers(0, 2), st.sets(st.integers(0, 8), max_size=5)), min_size=1, max_size=8)
something = tasks_and_sets.filter(lambda samples: any(sample for _, sample in samples))


def coverage(samples: list[tuple[int, set[int]]], chosen: list[int]) -> tuple[Fraction, list[Fraction | None]]:
    """Mean over tasks, and of each task, of the share of its neurons that the chosen samples have."""
    shares: list[Fraction | None] = []
    for task in range(max(task for task, _ in samples) + 1):
        whole = union([sample for t, sample in samples if t == task])
        part = union([samples[i][1] for i in chosen if samples[i][0] == task])
        shares.append(Fraction(part, whole) if whole else None)
    known = [share for share in shares if share is not None]
    return sum(known, Fraction(0)) / len(known), shares


def plain_greedy(samples: list[tuple[int, set[int]]], size: int) -> list[int]:
    order: list[int] = []
    while len(order) < size:
        left = [i for i in range(len(samples)) if i not in order]
        best = max(left, key=lambda i: (coverage(samples, [*order, i])[0], -i), default=None)
        if best is None or coverage(samples, [*order, best])[0] == coverage(samples, order)[0]:
            break
        order.append(best)
    return order


@given(something, st.data())
@settings(deadline=None)
def test_lazy_greedy_is_plain_greedy(samples: list[tuple[int, set[int]]], data: st.DataObject) -> None:
    size = data.draw(st.integers(1, len(samples)))
    tasks = np.array([task for task, _ in samples])
    found = greedy_max_coverage(matrix([sample for _, sample in samples]), tasks, size)
    assert found.order.tolist() == plain_greedy(samples, size)
    for n in range(1, len(found.order) + 1):
        overall, by_task = coverage(samples, found.order[:n].tolist())
        assert found.kept.overall[n - 1] == pytest.approx(float(overall))
        for share, expected in zip(found.kept.by_task, by_task, strict=True):
            if expected is None:
                assert share is None
            else:
                assert share is not None
                assert share[n - 1] == pytest.approx(float(expected))


def test_lazy_greedy_is_plain_greedy_among_many() -> None:
    rng = np.random.default_rng(6)
    samples = [
        (int(rng.integers(4)), set((rng.pareto(0.6, 12) * 4).astype(int).clip(0, 199).tolist())) for _ in range(60)
    ]
    found = greedy_max_coverage(
        matrix([sample for _, sample in samples], 200), np.array([task for task, _ in samples]), 25
    )
    assert found.order.tolist() == plain_greedy(samples, 25)


@given(something, st.data())
@settings(deadline=None)
def test_greedy_keeps_most_of_what_can_be_kept(samples: list[tuple[int, set[int]]], data: st.DataObject) -> None:
    size = data.draw(st.integers(1, len(samples)))
    tasks = np.array([task for task, _ in samples])
    kept = greedy_max_coverage(matrix([sample for _, sample in samples]), tasks, size).kept.overall[-1]
    best = max(coverage(samples, list(chosen))[0] for chosen in combinations(range(len(samples)), size))
    assert kept >= (1 - 1 / math.e) * float(best) - 1e-12


@given(something)
@settings(deadline=None)
def test_random_is_the_mean_over_all_choices(samples: list[tuple[int, set[int]]]) -> None:
    tasks = np.array([task for task, _ in samples])
    found = greedy_max_coverage(matrix([sample for _, sample in samples]), tasks, len(samples))
    for n in range(1, len(found.order) + 1):
        drawn = [coverage(samples, list(chosen)) for chosen in combinations(range(len(samples)), n)]
        assert found.random.overall[n - 1] == pytest.approx(float(sum(overall for overall, _ in drawn) / len(drawn)))
        for task, share in enumerate(found.random.by_task):
            if share is not None:
                assert share[n - 1] == pytest.approx(float(sum(by_task[task] for _, by_task in drawn)) / len(drawn))


def test_a_tie_goes_to_the_lower_index_and_what_adds_nothing_is_left_out() -> None:
    samples = [set(), {3}, {0, 1}, {0, 1}, {3}, {0, 1, 3}]
    assert greedy_max_coverage(matrix(samples[:5]), np.zeros(5, int), 4).order.tolist() == [2, 1]
    found = greedy_max_coverage(matrix(samples), np.zeros(6, int), 6)
    assert found.order.tolist() == [5]
    assert found.kept.overall.tolist() == [1.0]


def test_tasks_count_alike_whatever_their_size() -> None:
    """One of two neurons of a small task is more than two of six of a large one."""
    samples = [{0, 1}, {2, 3, 4, 5}, {0}, {7}]
    found = greedy_max_coverage(matrix(samples), np.array([0, 0, 2, 2]), 3)
    assert found.order.tolist() == [1, 2, 3]
    assert found.kept.overall == pytest.approx([1 / 3, 1 / 3 + 1 / 4, 1 / 3 + 1 / 2])
    assert found.kept.by_task[1] is None  # no sample is of this task

"""Error bars of one probe pass, against brute force, plain loops and simulations.

Shapes: N samples, J neurons, R replicates, T topics, K sizes of a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from mui_callback.metrics import resampling
from mui_callback.metrics.rarefaction import coverage_curve
from mui_callback.metrics.resampling import (
    Estimate,
    Interval,
    bootstrap_intervals,
    bootstrap_weights,
    ratio_of_sums,
    union_size,
)

N_NEURONS = 12
sets = st.lists(st.sets(st.integers(0, N_NEURONS - 1), max_size=6), min_size=1, max_size=6)
amounts = st.lists(st.tuples(st.floats(-9, 9), st.integers(0, 9)), min_size=2, max_size=12)


def matrix(samples: list[set[int]]) -> csr_array:
    rows = [sorted(sample, reverse=True) for sample in samples]
    columns = np.array([column for row in rows for column in row], dtype=np.int32)
    ends = np.cumsum([0, *map(len, rows)])
    return csr_array((np.ones(len(columns), np.uint8), columns, ends), shape=(len(rows), N_NEURONS))


def weights(n: int, replicates: int = 1000, seed: int = 0) -> np.ndarray:
    return np.concatenate(list(bootstrap_weights(n, replicates, seed)))


def interval(estimate: Estimate | None, **options: float) -> Interval:
    found = bootstrap_intervals({"": estimate}, **options)[""]  # type: ignore[arg-type]
    assert found is not None
    return found


# Estimates


@given(sets, st.sets(st.integers(0, N_NEURONS - 1)))
def test_a_sample_adds_to_the_union_what_is_gone_without_it(samples: list[set[int]], where: set[int]) -> None:
    where_J = np.array([neuron in where for neuron in range(N_NEURONS)])
    every = set(range(N_NEURONS))
    for counted, found in ((every, union_size(matrix(samples))), (where, union_size(matrix(samples), where_J))):
        assert found is not None
        size = len(set().union(*samples) & counted)
        assert found.value == size
        own = [size - len(set().union(*samples[:i], *samples[i + 1 :]) & counted) for i in range(len(samples))]
        assert found.influence == pytest.approx([one - sum(own) / len(own) for one in own])


@given(sets.filter(lambda samples: len(samples) > 1))
@settings(deadline=None)
def test_the_standard_error_of_mui_is_that_of_the_coverage_curve(samples: list[set[int]]) -> None:
    union = union_size(matrix(samples))
    assert union is not None
    mui = union.over(N_NEURONS)
    curve = coverage_curve(matrix(samples), np.array([len(samples)]))
    assert mui is not None
    assert curve.error is not None
    assert mui.value == curve.mui[0]
    assert mui.standard_error == pytest.approx(curve.error[0])


def test_where_samples_share_nothing_the_union_is_a_sum_of_sizes() -> None:
    samples = [{0, 1, 2}, {3}, set(), {4, 5, 6, 7, 8}]
    found = union_size(matrix(samples))
    assert found is not None
    assert found.standard_error == pytest.approx(np.sqrt(4) * np.std([3, 1, 0, 5], ddof=1))


@given(amounts)
def test_the_influence_on_a_ratio_is_its_derivative_by_the_weight(pairs: list[tuple[float, int]]) -> None:
    numerator, denominator = (np.array(column, dtype=np.float64) for column in zip(*pairs, strict=True))
    found = ratio_of_sums(numerator, denominator)
    if denominator.sum() == 0:
        assert found is None
        return
    assert found is not None
    assert found.value == pytest.approx(numerator.sum() / denominator.sum())
    assert found.influence.sum() == pytest.approx(0, abs=1e-9)
    step = 1e-6
    for i in range(len(pairs)):
        weight = np.ones(len(pairs))
        weight[i] += step
        moved = (weight @ numerator) / (weight @ denominator)
        assert found.influence[i] == pytest.approx((moved - found.value) / step, rel=1e-3, abs=1e-4)


def test_the_standard_error_of_a_mean_is_the_textbooks() -> None:
    values = np.array([0.5, 2.0, 2.0, 7.0])
    mean = ratio_of_sums(values, np.ones(4))
    assert mean is not None
    assert mean.standard_error == pytest.approx(values.std(ddof=1) / 2)
    # samples without an answer are not samples of it
    of_some = ratio_of_sums(np.append(values, [0, 0]), np.array([1, 1, 1, 1, 0, 0]))
    assert of_some is not None
    assert of_some.n_samples == 4
    assert of_some.standard_error == pytest.approx(values.std(ddof=1) / 2)


def test_a_share_of_the_union_follows_the_delta_method() -> None:
    rng = np.random.default_rng(0)
    a = Estimate(6.0, rng.normal(size=5))
    b = Estimate(8.0, rng.normal(size=5))
    share = a.over(b)
    assert share is not None
    assert share.value == 0.75
    step = 1e-6
    moved = (6.0 + step * a.influence) / (8.0 + step * b.influence)
    assert share.influence == pytest.approx((moved - 0.75) / step, rel=1e-4)
    whole = a.over(a)
    assert whole is not None
    assert whole.influence.tolist() == [0, 0, 0, 0, 0]
    assert a.over(Estimate(0.0, np.zeros(5))) is None
    negative = a.over(-2)
    assert negative is not None
    assert (negative.value, negative.influence.tolist()) == (-3.0, (a.influence / -2).tolist())


def test_without_samples_there_is_no_value_and_with_one_no_error() -> None:
    assert union_size(matrix([])) is None
    assert ratio_of_sums(np.zeros(0), np.zeros(0)) is None
    assert ratio_of_sums(np.array([np.nan, 1.0]), np.ones(2)) is None
    one = union_size(matrix([{1, 2}]))
    assert one is not None
    assert (one.value, one.influence.tolist(), one.standard_error) == (2.0, [0.0], None)


# The bootstrap


def test_replicates_that_all_miss_the_samples_with_an_answer_give_no_interval() -> None:
    accuracy = ratio_of_sums(np.array([1.0, 0.0] + 50 * [0.0]), np.array([1.0, 1.0] + 50 * [0.0]))
    assert not weights(52, replicates=1, seed=2)[:, :2].any()
    assert bootstrap_intervals({"accuracy": accuracy}, replicates=1, seed=2) == {"accuracy": None}


@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 5))
def test_a_replicate_draws_as_many_samples_as_there_are(n: int, replicates: int, seed: int) -> None:
    drawn = weights(n, replicates, seed)
    assert drawn.shape == (replicates, n)
    assert (drawn.sum(axis=1) == n).all()
    assert (drawn >= 0).all()
    assert (drawn == np.round(drawn)).all()


def test_the_weights_are_multinomial() -> None:
    n, replicates = 4, 40_000
    drawn = weights(n, replicates)
    kinds, found = np.unique(drawn, axis=0, return_counts=True)
    assert len(kinds) == math.comb(2 * n - 1, n)
    for kind, count in zip(kinds.astype(int).tolist(), found.tolist(), strict=True):
        chance = math.factorial(n) / math.prod(map(math.factorial, kind)) / n**n
        assert count == pytest.approx(replicates * chance, abs=4.5 * math.sqrt(replicates * chance))


@pytest.mark.parametrize("pairs", [1, 7, 40, 10**6])
def test_the_weights_do_not_depend_on_blocks(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = weights(7, 50, seed=3)
    monkeypatch.setattr(resampling, "_PAIRS_AT_ONCE", pairs)
    blocks = list(bootstrap_weights(7, 50, seed=3))
    assert max(block.size for block in blocks) <= max(pairs, 7)
    assert np.concatenate(blocks).tolist() == whole.tolist()
    assert weights(7, 20, seed=3).tolist() == whole[:20].tolist()
    assert weights(7, 50, seed=4).tolist() != whole.tolist()


def tail(n: int) -> float:
    """Hesterberg's, for 0.95, from a table of Student's t."""
    t = {2: 12.706205, 5: 2.776445, 8: 2.364624, 30: 2.045230}[n]
    return 0.5 * math.erfc(math.sqrt(n / (n - 1)) * t / math.sqrt(2))


@pytest.mark.parametrize("n", [2, 5, 8, 30])
def test_an_interval_is_that_of_a_plain_loop(n: int) -> None:
    rng = np.random.default_rng(n)
    tokens = rng.integers(1, 50, n)
    loss = tokens * rng.gamma(3, size=n)
    influence = rng.normal(size=n)
    union = Estimate(40.0, influence - influence.mean())
    ratios, unions = [], []
    for drawn in weights(n, 300, seed=5):
        chosen = [i for i in range(n) for _ in range(int(drawn[i]))]
        ratios.append(sum(loss[i] for i in chosen) / sum(tokens[i] for i in chosen))
        unions.append(40.0 + sum((drawn[i] - 1) * union.influence[i] for i in range(n)))
    found = bootstrap_intervals({"loss": ratio_of_sums(loss, tokens), "union": union}, replicates=300, seed=5)
    for name, values in (("loss", ratios), ("union", unions)):
        one = found[name]
        assert one is not None
        ends = np.quantile(values, [tail(n), 1 - tail(n)])
        assert (one.low, one.high) == pytest.approx((ends[0], ends[1]), rel=1e-6)
        assert one.level == 0.95


def test_an_interval_of_a_mean_is_as_long_as_students() -> None:
    values = np.random.default_rng(0).normal(size=30)
    mean = ratio_of_sums(values, np.ones(30))
    assert mean is not None
    found = interval(mean, replicates=20_000)
    assert mean.standard_error is not None
    assert found.high - found.low == pytest.approx(2 * 2.045230 * mean.standard_error, rel=0.03)


def test_measures_are_resampled_together_and_in_any_company() -> None:
    rng = np.random.default_rng(1)
    loss, tokens = rng.gamma(2, size=(2, 20))
    first, second = ratio_of_sums(loss, tokens), ratio_of_sums(2 * loss, tokens)
    union = Estimate(9.0, loss - loss.mean())
    together = bootstrap_intervals({"a": first, "b": second, "u": union, "none": None})
    assert list(together) == ["a", "b", "u", "none"]
    assert together["none"] is None
    alone = interval(first)
    assert together["a"] == alone
    assert together["b"] == Interval(2 * alone.low, 2 * alone.high, 0.95)
    assert interval(first, seed=1) != alone


def test_where_samples_say_nothing_of_the_spread_there_is_no_interval() -> None:
    all_right = ratio_of_sums(np.full(10, 0.1), np.full(10, 0.1))
    one_sample = ratio_of_sums(np.ones(1), np.ones(1))
    one_with_choices = ratio_of_sums(np.array([1.0, 0, 0]), np.array([1.0, 0, 0]))
    rounded = ratio_of_sums(np.array([0.1, 0.2, 0.3]), np.array([1.0, 2.0, 3.0]))
    for estimate in (all_right, one_sample, one_with_choices, rounded, Estimate(3.0, np.zeros(4))):
        assert estimate is not None
        assert bootstrap_intervals({"x": estimate}) == {"x": None}
    assert bootstrap_intervals({}) == {}


def test_a_replicate_without_a_denominator_does_not_count() -> None:
    amount, is_there = np.zeros(40), np.zeros(40)
    is_there[:3], amount[:3] = 1, [5, 6, 7]
    assert (weights(40)[:, :3].sum(axis=1) == 0).any()
    found = interval(ratio_of_sums(amount, is_there))
    assert (found.low, found.high) == (5, 7)


def test_an_interval_can_be_kept_within_what_is_possible() -> None:
    assert Interval(-0.25, 1.5, 0.9).within(0, 1) == Interval(0, 1, 0.9)
    assert Interval(-0.25, 1.5, 0.9).within(0, None) == Interval(0, 1.5, 0.9)
    assert Interval(0.25, 0.5, 0.9).within(0, 1) == Interval(0.25, 0.5, 0.9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ratio_of_sums(np.ones(3), np.ones(2)), "got the shapes (3,) and (2,)"),
        (lambda: union_size(matrix([{0}]), np.ones(3, np.bool_)), "each of 12 neurons, got the shape (3,)"),
        (lambda: Estimate(1, np.ones(3)).over(Estimate(1, np.ones(2))), "same samples, got those of 3 and 2 samples"),
        (lambda: bootstrap_intervals({"a": Estimate(1, np.ones(3)), "b": Estimate(1, np.ones(2))}), "(a: 3, b: 2)"),
        (lambda: bootstrap_intervals({}, level=95), "level: expected a number in (0, 1), got 95"),
        (lambda: bootstrap_intervals({}, replicates=0), "replicates: expected a positive number, got 0"),
    ],
)
def test_what_cannot_be_answered_is_said(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as raised:
        call()
    assert message in str(raised.value)


# Simulations: samples of topics, whose neurons come together, and of different sizes

SIZE_K, SHARE_K = np.array([0.5, 1.0, 1.5]), np.array([0.3, 0.4, 0.3])
SHARE_T = np.array([0.41, 0.2, 0.14, 0.1, 0.08, 0.07])
CHANCE_TJ = np.stack([np.random.default_rng(t).permutation(0.5 / np.arange(1, 601) ** 0.8) for t in range(6)])
LOSS_T = 1 + 0.5 * np.arange(6)
IS_SHARED_J = np.arange(600) % 4 == 0


def true_values(n: int) -> dict[str, float]:
    chance_J = sum(share * SHARE_T @ (size * CHANCE_TJ) for size, share in zip(SIZE_K, SHARE_K, strict=True))
    reached_J = 1 - (1 - chance_J) ** n
    shared = reached_J[IS_SHARED_J].sum() / reached_J.sum()
    return {"union": float(reached_J.sum()), "loss": float(SHARE_T @ LOSS_T), "shared": float(shared)}


def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, dict[str, Estimate | None]]:
    """Which sample has which neuron, bool ``[N, J]``, and the estimates."""
    topic_N, size_N = rng.choice(6, n, p=SHARE_T), rng.choice(SIZE_K, n, p=SHARE_K)
    has_NJ = rng.random((n, 600)) < size_N[:, None] * CHANCE_TJ[topic_N]
    tokens_N = 1 + rng.poisson(20 * size_N)
    loss_N = tokens_N * LOSS_T[topic_N] * rng.gamma(4, 1 / 4, n)
    key_neurons = csr_array(has_NJ.astype(np.uint8))
    union = union_size(key_neurons)
    shared = union_size(key_neurons, IS_SHARED_J)
    assert union is not None
    assert shared is not None
    return has_NJ, {"union": union, "loss": ratio_of_sums(loss_N, tokens_N), "shared": shared.over(union)}


@pytest.mark.parametrize(("n", "repetitions", "least"), [(8, 400, 0.86), (32, 400, 0.9), (200, 200, 0.9)])
def test_the_interval_has_the_truth_nearly_as_often_as_it_says(n: int, repetitions: int, least: float) -> None:
    """Few samples make intervals of skewed amounts too short; that of the union is rather too long with many."""
    rng = np.random.default_rng(1)
    truth = true_values(n)
    inside = dict.fromkeys(truth, 0)
    for seed in range(repetitions):
        found = bootstrap_intervals(draw(rng, n)[1], replicates=500, seed=seed)
        for name, true in truth.items():
            one = found[name]
            assert one is not None
            inside[name] += one.low <= true <= one.high
    assert min(inside.values()) / repetitions > least
    assert inside["union"] / repetitions > 0.91


def test_the_variance_of_the_union_is_on_average_not_too_small() -> None:
    rng = np.random.default_rng(2)
    for n in (8, 32):
        found = [draw(rng, n)[1]["union"] for _ in range(1000)]
        variance = np.mean([one.standard_error**2 for one in found if one and one.standard_error is not None])
        assert 0.9 < variance / np.var([one.value for one in found if one]) < 1.4


def test_a_plain_bootstrap_of_the_union_never_has_the_truth() -> None:
    """Resampled sets lack what is in the samples that were not drawn."""
    rng = np.random.default_rng(3)
    for n, most in ((32, 0.1), (200, 0.0)):
        truth, inside, reaches = true_values(n)["union"], 0, 0
        for seed in range(50):
            has_NJ, estimates = draw(rng, n)
            drawn_RN = (weights(n, 200, seed) > 0).astype(np.float32)
            union_R = (drawn_RN @ has_NJ.astype(np.float32) > 0).sum(axis=1)
            low, high = np.quantile(union_R, [0.025, 0.975])
            inside += low <= truth <= high
            assert estimates["union"] is not None
            reaches += high >= estimates["union"].value
        assert inside / 50 <= most
        assert reaches == 0

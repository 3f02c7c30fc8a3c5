"""Random controls: as many of each layer and kind, other ones as far as there are enough, all alike likely."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from mui_callback.layout import ExpertLayout, LayerShape
from mui_callback.metrics.random_control import neurons_of_experts, random_experts, random_neurons
from mui_callback.metrics.utilization import BoolArray

shapes = st.builds(
    LayerShape,
    layer=st.integers(0, 99),
    path=st.just("mlp"),
    n_routed=st.integers(1, 4),
    routed_width=st.integers(1, 5),
    shared_widths=st.lists(st.integers(1, 5), max_size=3).map(tuple),
)
layouts = st.lists(shapes, min_size=1, max_size=3).map(ExpertLayout)
seeds = st.integers(0, 2**32 - 1)


def groups(layout: ExpertLayout, *, of_experts: bool) -> list[list[int]]:
    """The numbers of the experts, or neurons, of each layer and kind, counted by hand."""
    found: dict[tuple[int, bool], list[int]] = {}
    number = 0
    for index, layer in enumerate(layout.layers):
        for expert, width in enumerate(layer.widths):
            for _ in range(1 if of_experts else width):
                found.setdefault((index, expert >= layer.n_routed), []).append(number)
                number += 1
    return list(found.values())


def some(n: int, share: float, seed: int) -> BoolArray:
    return np.random.default_rng(seed).random(n) < share


@given(layouts, st.booleans(), st.floats(0, 1), seeds)
@settings(deadline=None)
def test_there_are_as_many_of_each_layer_and_kind_and_no_more_key_ones_than_must_be(
    layout: ExpertLayout, of_experts: bool, share: float, seed: int
) -> None:
    draw, n = (random_experts, layout.n_experts) if of_experts else (random_neurons, layout.n_neurons)
    is_key = some(n, share, seed)
    control = draw(layout, is_key, np.random.default_rng(seed))
    must_overlap = 0
    for group in groups(layout, of_experts=of_experts):
        n_key, n_others = is_key[group].sum(), (~is_key[group]).sum()
        assert control.is_drawn[group].sum() == n_key
        must_overlap += max(0, n_key - n_others)
        if n_others <= n_key:
            assert control.is_drawn[group][~is_key[group]].all()
    assert control.is_drawn.shape == (n,)
    assert control.n_overlap == (control.is_drawn & is_key).sum() == must_overlap


@given(layouts, st.floats(0, 1), seeds)
@settings(deadline=None)
def test_neurons_of_experts_are_all_of_theirs(layout: ExpertLayout, share: float, seed: int) -> None:
    is_in = some(layout.n_experts, share, seed)
    names = layout.expert_labels
    found = {layout.name_neuron(int(neuron)) for neuron in np.flatnonzero(neurons_of_experts(layout, is_in))}
    expected = {
        (layer.layer, name.rpartition("-")[2], neuron)
        for name, is_chosen, width, layer in zip(
            names, is_in, layout.width, [layout.layers[index] for index in layout.layer_of_expert], strict=True
        )
        if is_chosen
        for neuron in range(width)
    }
    assert {tuple(neuron) for neuron in found} == expected


def test_a_seed_says_what_is_drawn() -> None:
    layout = ExpertLayout([LayerShape(0, "mlp", 4, 100, (100,))])
    is_key = some(layout.n_neurons, 0.1, 0)
    first, again, other = (random_neurons(layout, is_key, np.random.default_rng(seed)).is_drawn for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("n_key", [2, 4])
def test_every_control_is_as_likely_as_any_other(n_key: int) -> None:
    # 6 routed neurons and 3 shared ones. With 2 and 1 key ones there are C(4, 2) · 2 controls; with 4 and 2 all others
    # are taken, and C(4, 2) · C(2, 1) ways to take the rest from the key ones.
    layout = ExpertLayout([LayerShape(0, "mlp", 2, 3, (3,))])
    is_key = np.zeros(9, dtype=np.bool_)
    is_key[[*range(n_key), *range(6, 6 + n_key // 2)]] = True
    routed, shared = np.flatnonzero(~is_key[:6]), 6 + np.flatnonzero(~is_key[6:])
    if n_key == 2:
        possible = product(combinations(routed, 2), combinations(shared, 1))
    else:
        taken = ((*routed, *pair) for pair in combinations(range(4), 2))
        possible = product(taken, ((*shared, one) for one in (6, 7)))
    counted = {frozenset(map(int, one + other)): 0 for one, other in possible}
    assert len(counted) == 12
    rng = np.random.default_rng(5)
    for _ in range(2400):
        counted[frozenset(np.flatnonzero(random_neurons(layout, is_key, rng).is_drawn).tolist())] += 1
    assert chisquare(list(counted.values())).pvalue > 0.01


def test_what_is_key_has_to_be_said_of_each() -> None:
    layout = ExpertLayout([LayerShape(0, "mlp", 2, 3)])
    with pytest.raises(ValueError, match=r"expected which are key as bool \[6\], got bool \[2\]"):
        random_neurons(layout, np.zeros(2, dtype=np.bool_), np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"bool \[2\], got int64 \[2\]"):
        random_experts(layout, np.zeros(2, dtype=np.int64), np.random.default_rng(0))  # type: ignore[arg-type]

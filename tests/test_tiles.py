"""Experts that go through their steps in tiles: all rows, once, and the same numbers as all together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mui_callback import MUIProbe, ProbeSet
from mui_callback.experts import tiles
from mui_callback.experts.tiles import Tile, by_tile
from mui_callback.settings import Activation
from tiny import build
from tiny_samples import make_samples


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 12))
@settings(max_examples=150, deadline=None)
def test_every_row_is_multiplied_with_the_weight_of_its_expert(sizes: list[int], at_least: int) -> None:
    generator = torch.Generator().manual_seed(sum(sizes))
    expert_S = torch.repeat_interleave(torch.tensor(sizes))
    weight_ENM = torch.randn(len(sizes), 8, 4, generator=generator)
    x_SN = torch.randn(len(expert_S), 8, generator=generator)
    seen: list[Tile] = []

    def make(tile: Tile) -> tuple[Tensor, Tensor]:
        seen.append(tile)
        return tile.product(tile.of(x_SN), weight_ENM), tile.of(expert_S)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "_MIN_ROWS", at_least)
        found_SM, found_S = by_tile(make, torch.tensor(sizes).cumsum(0).int(), len(expert_S))
    assert torch.equal(found_S, expert_S)
    for row, expert in enumerate(expert_S.tolist()):
        expected_M = x_SN[row].double() @ weight_ENM[expert].double()
        torch.testing.assert_close(found_SM[row].double(), expected_M, rtol=1e-5, atol=1e-6)
    n_rows = [tile.rows.stop - tile.rows.start for tile in seen]
    assert sum(n_rows) == len(expert_S)
    assert len(seen) == 1 or min(n_rows[:-1]) >= at_least
    if len(expert_S) >= 2 * at_least and max(sizes) < at_least:
        assert max(n_rows) < 2 * at_least


def with_norms() -> nn.Module:
    """A norm after each expert."""
    model = build("olmoe")
    for layer in model.model.layers:
        layer.mlp.experts.has_post_expert_norm = True
        layer.mlp.experts.post_expert_norm = nn.RMSNorm(24, eps=1e-6)
        nn.init.normal_(layer.mlp.experts.post_expert_norm.weight)
    return model


@pytest.mark.parametrize(
    ("make", "activation"),
    [
        (partial(build, "olmoe"), "product"),
        (partial(build, "olmoe"), "gate"),
        (partial(build, "qwen2_moe"), "product"),
        (partial(build, "gpt_oss"), "product"),
        (with_norms, "product"),
    ],
    ids=["olmoe", "olmoe, gate", "qwen2_moe", "gpt_oss", "norms"],
)
def test_a_probe_finds_the_same_in_tiles(
    make: Callable[[], nn.Module], activation: Activation, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    probe_set = ProbeSet({"a": make_samples(lengths=(14, 13, 12, 11))})
    calls: list[int] = []
    product = Tile.product

    def counted(tile: Tile, x: Tensor, weight: Tensor) -> Tensor:
        calls.append(len(x))
        return product(tile, x, weight)

    monkeypatch.setattr(Tile, "product", counted)
    together = MUIProbe(model, probe_set, activation=activation).measure()
    n_together = len(calls)
    monkeypatch.setattr(tiles, "_MIN_ROWS", 3)
    in_tiles = MUIProbe(model, probe_set, activation=activation).measure()
    assert len(calls) - n_together > n_together
    for ours, theirs in zip(in_tiles.counts.key_sets, together.counts.key_sets, strict=True):
        assert np.array_equal(ours.neuron, theirs.neuron)
        assert np.array_equal(ours.end, theirs.end)
    np.testing.assert_allclose(in_tiles.counts.mass, together.counts.mass, rtol=1e-5)
    np.testing.assert_allclose(in_tiles.counts.loss, together.counts.loss, rtol=1e-6)
    assert in_tiles.counts.identity_error.max() < 1e-5


def test_a_mask_does_the_same_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("olmoe")
    probe = MUIProbe(model, ProbeSet({"a": make_samples(lengths=(14, 13, 12, 11))}), rules="top_fraction=0.1")
    report = probe.measure()
    together = probe.ablate(report)
    monkeypatch.setattr(tiles, "_MIN_ROWS", 3)
    ours, theirs = probe.ablate(report).tasks["a"].changes, together.tasks["a"].changes
    assert ours is not None
    assert theirs is not None
    assert abs(theirs.key.value) > 1e-4
    assert ours.key.value == pytest.approx(theirs.key.value, rel=1e-3)

"""Rows that a dispatch has announced are those of a plain loop over experts; products that do not fit are told."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mui_callback.errors import ProbeError
from mui_callback.experts.dispatch import Arrivals
from mui_callback.experts.down import Product
from mui_callback.experts.followed import FollowedRows
from mui_callback.experts.host_copy import HostCopy

D, WIDTH, FIRST = 6, 5, 4
"""Width of the model, neurons of an expert, and number of the first expert of this process."""


class Layer:
    """Some experts, and what comes to them: as many rows each, most of tokens, some of none."""

    def __init__(self, seed: int, n_rows: list[int], n_tokens: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.weights = [draw(D, WIDTH) for _ in n_rows]
        self.biases = [draw(D) if expert != 1 else None for expert in range(len(n_rows))]
        self.acts = [draw(n, WIDTH) for n in n_rows]
        self.readout_RD = draw(n_tokens, D)
        self.tokens = [torch.randperm(n_tokens + n, generator=generator)[:n] for n in n_rows]
        self.tokens = [token.where(token < n_tokens, -1) for token in self.tokens]  # an expert has a token once
        n_L = torch.tensor(n_rows)
        self.came = Arrivals(n_L.cumsum(0) - n_L, n_L, torch.cat(self.tokens), torch.rand(sum(n_rows)))
        self.has_met = True

    @property
    def n_scored(self) -> HostCopy:
        return HostCopy(torch.stack([(token_S >= 0).sum() for token_S in self.tokens]))

    def meet(self) -> None:
        self.has_met = True

    def arrivals(self) -> Arrivals:
        assert self.has_met
        return self.came

    def followed(self) -> FollowedRows:
        return FollowedRows(self, self.readout_RD, len(self.weights), FIRST)

    def product(self, expert: int) -> Product:
        act_SI, down_DI = self.acts[expert], self.weights[expert]
        return Product(act_SI, act_SI @ down_DI.T, self.biases[expert], weight=down_DI)

    def naive(self) -> dict[tuple[int, int], Tensor]:
        """Contributions by token and expert."""
        found = {}
        weights = iter(self.came.weight_N.tolist())
        for expert, (act_SI, token_S, down_DI) in enumerate(zip(self.acts, self.tokens, self.weights, strict=True)):
            for act_I, token in zip(act_SI, token_S.tolist(), strict=True):
                weight = next(weights)
                if token >= 0:
                    found[token, FIRST + expert] = weight * act_I * (self.readout_RD[token] @ down_DI)
        return found

    def naive_biases(self) -> Tensor:
        """⟨weighted output biases, readout⟩ of each token."""
        unmade_R, weights = torch.zeros(len(self.readout_RD)), iter(self.came.weight_N.tolist())
        for token_S, bias in zip(self.tokens, self.biases, strict=True):
            for token in token_S.tolist():
                weight = next(weights)
                if token >= 0 and bias is not None:
                    unmade_R[token] += weight * (bias @ self.readout_RD[token])
        return unmade_R


def assert_those_of_the_loop(layer: Layer, followed: FollowedRows) -> None:
    rows, contributions = followed.rows(WIDTH)
    keys = list(zip(rows.token_P.tolist(), rows.down_P.tolist(), strict=True))
    expected = layer.naive()
    assert sorted(keys) == sorted(expected)
    for key, score_I in zip(keys, contributions.all(), strict=True):
        torch.testing.assert_close(score_I, expected[key])
    for key, rank in zip(keys, rows.rank_P.tolist(), strict=True):
        assert rank == sum(token == key[0] and down < key[1] for token, down in keys)
    assert rows.rows_per_token == max((rows.rank_P.max().item() + 1 if keys else 1), 1)
    assert not rows.are_repeated


LAYERS = st.builds(
    Layer, st.integers(0, 2**31), st.lists(st.integers(0, 7), min_size=1, max_size=5), n_tokens=st.integers(0, 6)
)


@settings(max_examples=60, deadline=None)
@given(LAYERS, st.randoms(), st.booleans())
def test_one_product_of_each_expert_in_any_order(layer: Layer, random: object, has_met: bool) -> None:
    followed, experts, layer.has_met = layer.followed(), list(range(len(layer.weights))), has_met
    random.shuffle(experts)  # type: ignore[attr-defined]
    for expert in experts:
        followed.add(expert, layer.product(expert), layer.acts[expert])
    followed.meet()
    followed.add_waiting()
    assert_those_of_the_loop(layer, followed)
    unmade_R = torch.zeros(len(layer.readout_RD), dtype=torch.float64)
    followed.add_biases(unmade_R)
    torch.testing.assert_close(unmade_R, layer.naive_biases(), check_dtype=False)


@settings(max_examples=60, deadline=None)
@given(LAYERS, st.integers(0, 3), st.booleans())
def test_one_product_of_all_experts_whose_rows_are_padded(layer: Layer, n_padded: int, has_met: bool) -> None:
    layer.has_met = has_met
    act_SI = torch.cat([torch.nn.functional.pad(act, (0, 0, 0, n_padded)) for act in layer.acts])
    expert_S = torch.arange(len(layer.acts)).repeat_interleave(torch.tensor([len(a) + n_padded for a in layer.acts]))
    weight_EDI = torch.stack(layer.weights)
    product = Product(act_SI, act_SI.new_zeros(len(act_SI), D), None, expert_S=expert_S, weight=weight_EDI)
    followed = layer.followed()
    followed.add(0, product, act_SI)
    followed.meet()
    followed.add_waiting()
    assert_those_of_the_loop(layer, followed)


@pytest.fixture
def layer() -> Layer:
    layer = Layer(1, [3, 4, 2], n_tokens=30)
    assert all((token >= 0).any() for token in layer.tokens)
    return layer


@pytest.mark.parametrize("experts", [[0, 2], [], [0, 1, 2, 1]], ids=["one missing", "none", "one twice"])
def test_each_expert_runs_once(layer: Layer, experts: list[int]) -> None:
    followed = layer.followed()
    for expert in experts:
        followed.add(expert, layer.product(expert), layer.acts[expert])
    with pytest.raises(ProbeError, match=r"expected each of 3 experts to run once .* got products with the pairs \["):
        followed.rows(WIDTH)


@pytest.mark.parametrize("has_met", [False, True])
def test_activations_that_are_written_to_are_told(layer: Layer, has_met: bool) -> None:
    layer.has_met = has_met
    act_SI, experts = torch.cat(layer.acts), torch.arange(len(layer.acts))
    expert_S = experts.repeat_interleave(torch.tensor([len(act) for act in layer.acts]))
    product = Product(act_SI, act_SI @ layer.weights[0].T, None, expert_S=expert_S, weight=torch.stack(layer.weights))
    followed = layer.followed()
    followed.add(0, product, act_SI)
    act_SI.mul_(2)
    followed.meet()
    with pytest.raises(ProbeError, match="activations that nobody writes to"):
        followed.add_waiting()


def test_a_product_of_no_rows_or_no_plain_one_is_told(layer: Layer) -> None:
    followed = layer.followed()
    with pytest.raises(ProbeError, match="tokens in expert 1, got none"):
        followed.add(1, layer.product(1), layer.acts[1][:0])
    act = layer.acts[1]
    with pytest.raises(ProbeError, match="expected down projections that are plain products"):
        followed.add(1, Product(act, act @ layer.weights[1].T, None), act)

"""Experts as lists of modules, in every way that people send tokens to them, against plain loops in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mui_callback import MoEBlock, MUIProbe, MUIReport, ProbeSet, StackedWeight, register_adapter
from mui_callback.errors import ProbeError, UnsupportedModelError
from mui_callback.experts.adapters import unregister_adapter
from naive import naive_key_neurons
from plain_moe import FACTS, ZOO, build_plain
from plain_naive import plain_scores
from reading import assert_conserved, layer_scores
from tiny_samples import make_samples

FRACTION = 0.05
Adapter = Callable[[nn.Module], MoEBlock | None]


def measure(model: nn.Module, **options: bool) -> MUIReport:
    return MUIProbe(model, ProbeSet({"a": make_samples()}), rules=f"top_fraction={FRACTION}", **options).measure()


@pytest.fixture
def adapters() -> Iterator[list[Adapter]]:
    registered: list[Adapter] = []
    yield registered
    for adapter in registered:
        unregister_adapter(adapter)


@pytest.mark.parametrize("name", list(ZOO))
def test_scores_and_key_neurons_equal_the_loops(name: str) -> None:
    model, samples = build_plain(name), make_samples()
    naive, log_likelihoods = plain_scores(model, name, [(s.input_ids.tolist(), s.scored.tolist()) for s in samples])
    for naive_layer, fast_layer in zip(naive, layer_scores(model, samples), strict=True):
        for expected, scores in zip(naive_layer.scores, fast_layer, strict=True):
            largest = max(map(abs, expected.values()))
            assert set(scores) == set(expected)
            assert max(abs(scores[entry] - value) for entry, value in expected.items()) < 1e-5 * largest
    report = measure(model)
    assert report.key_neurons() == set().union(*naive_key_neurons(naive, FRACTION))
    tokens = [value for sample in log_likelihoods for value in sample]
    assert report.pooled.loss == pytest.approx(-np.mean(tokens), rel=1e-5)
    routed = sum(len({(n, e) for n, e, _ in sample if e[0] == "E"}) for layer in naive for sample in layer.scores)
    assert report.counts.routed[:, ~report.layout.is_shared].sum() == routed


@pytest.mark.parametrize("name", list(ZOO))
def test_structure(name: str) -> None:
    facts = FACTS[name]
    layers = measure(build_plain(name)).layout.layers
    assert [layer.layer for layer in layers] == list(facts.layers)
    assert {layer.n_routed for layer in layers} == {facts.n_routed}
    assert {layer.routed_width for layer in layers} == {facts.width}
    assert {layer.shared_widths for layer in layers} == {tuple(facts.shared)}


@pytest.mark.parametrize("name", list(ZOO))
def test_conservation_identity(name: str) -> None:
    assert_conserved(build_plain(name), make_samples())


@pytest.mark.parametrize("name", ["deepseek_v1", "mixtral", "qwen2", "gpt2", "expert_norm", "latent"])
def test_half_precision(name: str) -> None:
    model = build_plain(name)
    exact, rounded = measure(model).key_neurons(), measure(model.to(torch.bfloat16))
    assert rounded.scalars()["mui/identity_error"] < 0.02
    assert len(exact & rounded.key_neurons()) > 0.5 * len(exact | rounded.key_neurons())


@pytest.mark.parametrize("name", ["deepseek_v1", "deepseek_v2", "slots", "expert_norm"])
def test_training_is_the_same_to_the_bit(name: str) -> None:
    def losses(*, probed: bool) -> list[float]:
        model = build_plain(name).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        ids = torch.randint(0, 384, (4, 17), generator=torch.Generator().manual_seed(0))
        found = []
        for step in range(4):
            if probed and step % 2:
                measure(model)
            logits = model(ids[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    assert losses(probed=True) == losses(probed=False)


def test_a_list_of_mlps_without_a_router_is_no_moe() -> None:
    assert [layer.layer for layer in measure(build_plain("decoy")).layout.layers] == [1]


def test_what_follows_the_experts_must_be_linear() -> None:
    with pytest.raises(ProbeError, match=r"layer 0 \(layers\.0\.mlp\): what follows its experts is not linear"):
        measure(build_plain("nonlinear_tail"))


def test_an_expert_that_is_not_found_is_noticed() -> None:
    with pytest.raises(ProbeError, match=r"layer 0 \(layers\.0\.mlp\): the contributions of its neurons do not add up"):
        measure(build_plain("hidden_mlp"))


def test_an_adapter_names_what_structure_does_not_tell(adapters: list[Adapter]) -> None:
    def with_side(module: nn.Module) -> MoEBlock | None:
        if not hasattr(module, "side"):
            return None
        return MoEBlock([expert.down_proj for expert in module.experts], shared=[list(module.side.children())[-1]])

    adapters.append(register_adapter(with_side))
    model = build_plain("hidden_mlp")
    assert_conserved(model, make_samples())
    assert all(layer.shared_widths for layer in measure(model).layout.layers)


def test_an_adapter_and_structure_agree(adapters: list[Adapter]) -> None:
    model = build_plain("qwen2")
    found = measure(model)

    def told(module: nn.Module) -> MoEBlock | None:
        if not hasattr(module, "shared_expert"):
            return None
        return MoEBlock([expert.down_proj for expert in module.experts], shared=[module.shared_expert.down_proj])

    adapters.append(register_adapter(told))
    assert measure(model).layout == found.layout
    assert measure(model).key_neurons() == found.key_neurons()


def test_an_output_that_goes_to_several_tokens_is_refused() -> None:
    with pytest.raises(ProbeError, match=r"layer 0 .*: an expert's output goes to several tokens at once"):
        measure(build_plain("soft_moe"))


def test_under_autocast_with_many_tokens() -> None:
    """The numbers of tokens travel through a tail in half precision, whatever the dtype of the weights."""
    model, samples = build_plain("mixtral"), make_samples(7, (60,) * 20)
    probe = MUIProbe(model, ProbeSet({"a": samples}), rules=f"top_fraction={FRACTION}", batch_tokens=10**6)
    exact = probe.measure()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = probe.measure()
    assert rounded.scalars()["mui/identity_error"] < 0.02
    ours, theirs = exact.key_neurons(), rounded.key_neurons()
    assert len(ours & theirs) > 0.7 * len(ours | theirs)
    routed = exact.counts.routed.sum(), rounded.counts.routed.sum()
    assert routed[0] == routed[1] == 3 * 2 * exact.tokens


class Around(nn.Module):
    """Something between a decoder layer and its block."""

    def __init__(self, block: nn.Module, forward: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.block, self.around = block, forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.around(self.block, x)


def test_positions_first_is_refused() -> None:
    model = build_plain("mixtral")
    for layer in model.layers:
        turned = Around(layer.block_sparse_moe, lambda block, x: block(x.transpose(0, 1).contiguous()).transpose(0, 1))
        layer.block_sparse_moe = turned
    with pytest.raises(ProbeError, match=r"expected an output \[4, 14, 24\] .*Models that have the positions first"):
        measure(model)


def test_shared_experts_that_see_positions_in_another_order_are_read_right() -> None:
    model = build_plain("qwen2")
    found = measure(model)

    class Turned(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.flip(0)
            return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)).flip(0)

    for layer in model.layers:
        layer.mlp.shared_expert = Turned(layer.mlp.shared_expert)
    report = measure(model)
    assert report.key_neurons() == found.key_neurons()
    assert report.counts.mass == pytest.approx(found.counts.mass, rel=1e-5)


def test_a_linear_map_that_is_named_a_norm_is_no_norm() -> None:
    class NormLinear(nn.Linear):
        pass

    model = build_plain("latent")
    found = measure(model)
    for layer in model.layers[1:]:
        linear = NormLinear(12, 24, bias=False)
        linear.load_state_dict(layer.mixer.out_of_latent.state_dict())
        layer.mixer.out_of_latent = linear
    report = measure(model)
    assert report.key_neurons() == found.key_neurons()
    assert report.counts.mass == pytest.approx(found.counts.mass, rel=1e-5)


def test_experts_of_several_layers_are_refused() -> None:
    model = build_plain("mixtral")
    for layer in model.layers[1:]:
        layer.block_sparse_moe.experts = model.layers[0].block_sparse_moe.experts
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.block_\w+ and layers\.1\.block_\w+ share"):
        measure(model)


def test_a_model_under_two_names_is_one_model() -> None:
    class Holder(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.net, self.alias = model, model.layers

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.net(input_ids, attention_mask)

    model = build_plain("mixtral")
    assert measure(Holder(model)).key_neurons() == measure(model).key_neurons()


def test_one_expert_with_an_adapter_does_not_hide_its_layer() -> None:
    model = build_plain("mixtral")
    expert = model.layers[1].block_sparse_moe.experts[2]

    class Adapted(nn.Module):
        def __init__(self, base_layer: nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features, self.base_layer = 16, 24, base_layer
            self.down, self.up = nn.Linear(16, 2, bias=False), nn.Linear(2, 24, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base_layer(x) + self.up(self.down(x))

    adapted = copy.deepcopy(model)
    layer = adapted.layers[1].block_sparse_moe
    layer.experts[2].w2 = Adapted(layer.experts[2].w2)
    merged = copy.deepcopy(model)
    with torch.no_grad():
        added = layer.experts[2].w2.up.weight @ layer.experts[2].w2.down.weight
        merged.layers[1].block_sparse_moe.experts[2].w2.weight += added
    assert measure(adapted).layout == measure(model).layout
    assert measure(adapted).key_neurons() == measure(merged).key_neurons()
    expert.w1, expert.w3, expert.w2 = nn.Linear(24, 20), nn.Linear(24, 20), nn.Linear(20, 24)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.block_\w+\.experts: expected experts of one width"):
        measure(model)


@pytest.mark.parametrize("as_keyword", [True, False])
def test_what_a_model_calls_its_tokens(as_keyword: bool) -> None:
    class Own(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

    class Positional(Own):
        def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
            return self.net(idx)

    class Named(Own):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.net(input_ids)

    model = build_plain("mixtral")

    class Parallel(nn.Module):
        """As a wrapper for data parallelism: takes anything, and hands it on."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any, **options: Any) -> torch.Tensor:
            return self.module(*args, **options)

    own = (Named if as_keyword else Positional)(model)
    assert measure(own).key_neurons() == measure(model).key_neurons()
    assert measure(Parallel(own)).key_neurons() == measure(model).key_neurons()


def test_a_token_that_is_not_finite_is_counted_and_the_rest_checked() -> None:
    model, sample = build_plain("mixtral"), make_samples()[0]
    with torch.no_grad():
        model.embed_tokens.weight[sample.input_ids[-2]] = float("nan")
    assert measure(model).not_finite > 0


def test_a_layer_that_sends_no_token_to_an_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its contributions are none, not an error."""
    monkeypatch.setattr("plain_moe.CAPACITY", 0)
    report = measure(build_plain("moduledict"))
    assert report.counts.routed.sum() == 0
    assert report.key_neurons() == frozenset()


def test_a_mapping_as_output_and_keywords_as_input() -> None:
    model = build_plain("mixtral")
    found = measure(model)
    for layer in model.layers:
        block = layer.block_sparse_moe
        for expert in block.experts:
            expert.forward = lambda x, e=expert: e.w2(input=nn.functional.silu(e.w1(x)) * e.w3(x))
        block.forward = lambda x, plain=block.forward: {"aux": torch.zeros(()), "out": plain(x)}
        layer.block_sparse_moe = Around(block, lambda block, x: block(x)["out"])
    assert measure(model).key_neurons() == found.key_neurons()


def test_stacked_weights_may_be_named(adapters: list[Adapter]) -> None:
    """The experts of the loops once more, but their down projections rows of one parameter that nobody can guess."""

    class Rows(nn.Module):
        def __init__(self, experts: nn.ModuleList) -> None:
            super().__init__()
            self.ups = nn.ModuleList(nn.ModuleList([expert.w1, expert.w3]) for expert in experts)
            self.rows = nn.Parameter(torch.cat([expert.w2.weight.detach().T for expert in experts]))

        def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
            gate, up = self.ups[expert]
            return (nn.functional.silu(gate(x)) * up(x)) @ self.rows.view(len(self.ups), -1, x.shape[-1])[expert]

    class One(nn.Module):
        def __init__(self, stack: Rows, number: int) -> None:
            super().__init__()
            self.call = lambda x: stack(x, number)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.call(x)

    model = build_plain("mixtral")
    found = measure(model)
    stacked = copy.deepcopy(model)
    for layer in stacked.layers:
        block = layer.block_sparse_moe
        block.stack = Rows(block.experts)
        block.experts = nn.ModuleList(One(block.stack, number) for number in range(len(block.experts)))

    def told(module: nn.Module) -> MoEBlock | None:
        stack = getattr(module, "stack", None)
        return None if stack is None else MoEBlock(StackedWeight(stack, stack.rows, 6, 16))

    adapters.append(register_adapter(told))
    report = measure(stacked)
    assert report.layout == found.layout
    assert report.key_neurons() == found.key_neurons()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda block: "experts", r"layers\.0\.block_sparse_moe: expected a MoEBlock or None from adapter .*'experts'"),
        (lambda block: MoEBlock([]), r"layers\.0\.block_sparse_moe: adapter .* names no routed experts"),
        (lambda block: MoEBlock([nn.Linear(3, 3)]), r"expected down projections that are in this module"),
        (lambda block: MoEBlock([block.experts[0]]), r"experts\.0: expected a linear map .* got MixtralMLP"),
        (lambda block: MoEBlock([block.experts[0].w1, block.experts[0].w2]), r"experts of one width, got 16, 24"),
    ],
)
def test_what_an_adapter_may_not_say(
    answer: Callable[[nn.Module], object], message: str, adapters: list[Adapter]
) -> None:
    def wrong(module: nn.Module) -> MoEBlock | None:
        return answer(module) if hasattr(module, "experts") else None  # type: ignore[return-value]

    adapters.append(register_adapter(wrong))
    with pytest.raises(UnsupportedModelError, match=message):
        measure(build_plain("mixtral"))


def renamed(name: str, block: str, **names: str) -> nn.Module:
    model = build_plain(name)
    for layer in model.layers:
        for expert in getattr(layer, block).experts:
            for old, new in names.items():
                setattr(expert, new, getattr(expert, old))
                delattr(expert, old)
            forward = type(expert).forward
            kept = {"names": expert.names, **{old: getattr(expert, new) for old, new in names.items()}}
            expert.forward = lambda x, kept=kept, forward=forward: forward(SimpleNamespace(**kept), x)
    return model


def test_of_two_maps_the_last_is_the_down_projection() -> None:
    found = measure(build_plain("square"))
    report = measure(renamed("square", "mlp", fc_in="one", fc_out="two"))
    assert report.key_neurons() == found.key_neurons()
    with pytest.raises(ProbeError, match="what follows its experts is not linear"):  # told apart from the activation
        measure(renamed("square", "mlp", fc_out="one", fc_in="two"))


def test_which_of_three_square_maps_is_the_last_must_be_told() -> None:
    """Each of gate, up and down may pass the checks: the output is linear in all but the gate."""
    model = build_plain("mixtral")
    for layer in model.layers:
        for expert in layer.block_sparse_moe.experts:
            expert.one, expert.two, expert.three = (nn.Linear(24, 24) for _ in range(3))
            del expert.w1, expert.w2, expert.w3
    with pytest.raises(UnsupportedModelError, match=r"experts\.0: its linear maps one, two, three have the same shape"):
        measure(model)

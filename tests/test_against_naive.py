"""The fast pass against the plain loops of `naive`, and the conservation identity, on six families."""

from __future__ import annotations

import copy

import pytest
from torch import nn

from mui_callback import MUIProbe, ProbeSet
from naive import NaiveLayer, naive_key_neurons, naive_scores
from reading import assert_conserved, layer_scores
from tiny import FAMILIES, build
from tiny_samples import make_samples

Naive = tuple[list[NaiveLayer], list[list[float]]]
TOP_FRACTION = 0.1  # tiny layers have a few dozen neurons; 0.1 % would keep one of them


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family: str) -> nn.Module:
    return build(family)


@pytest.fixture(scope="module")
def naive(model: nn.Module, family: str) -> Naive:
    return naive_scores(model, family, [(s.input_ids.tolist(), s.scored.tolist()) for s in make_samples()])


def test_scores_equal_the_loops(model: nn.Module, family: str, naive: Naive) -> None:
    layers, _ = naive
    fast = layer_scores(model, make_samples())
    assert len(fast) == len(layers)
    for naive_layer, scores in zip(layers, fast, strict=True):
        assert [set(s) for s in scores] == [set(s) for s in naive_layer.scores]
        for fast_sample, naive_sample in zip(scores, naive_layer.scores, strict=True):
            largest = max(abs(value) for value in naive_sample.values())
            for entry, value in naive_sample.items():
                assert fast_sample[entry] == pytest.approx(value, abs=1e-5 * largest)


def test_the_loops_conserve_the_output_of_the_layer(naive: Naive) -> None:
    """The reference itself is right: its terms add up to what the layer put out, less the output biases."""
    for layer in naive[0]:
        for scores, outputs in zip(layer.scores, layer.moe_output, strict=True):
            for n, output in enumerate(outputs):
                total = sum(value for (position, _, _), value in scores.items() if position == n)
                assert total == pytest.approx(output, abs=1e-9)


def test_key_neurons_equal_the_loops(model: nn.Module, naive: Naive) -> None:
    layers, log_likelihoods = naive
    samples = make_samples()
    probe = MUIProbe(model, ProbeSet({"a": samples[:2], "b": samples[2:]}), rules=f"top_fraction={TOP_FRACTION}")
    report = probe.measure()
    expected = naive_key_neurons(layers, TOP_FRACTION)
    assert report.key_neurons("a") == expected[0] | expected[1]
    assert report.key_neurons("b") == expected[2] | expected[3]
    assert report.key_neurons() == set().union(*expected)
    assert report.mui == len(set().union(*expected)) / sum(layer.n_neurons for layer in layers)

    frequency = dict(zip(report.layout.expert_labels, report.tasks["a"].activated_frequency, strict=True))
    for label, value in frequency.items():
        owners = [any(f"L{layer}-{expert}" == label for layer, expert, _ in sample) for sample in expected[:2]]
        assert value == sum(owners) / 2

    for row, sample in zip(report.key_neuron_sets().toarray(), expected, strict=True):
        assert {report.layout.name_neuron(int(neuron)) for neuron in row.nonzero()[0]} == sample
    shared = [sum(expert[0] == "S" for _, expert, _ in sample) for sample in expected]
    table = report.samples.to_pydict()
    assert table["n_key_neurons"] == [len(sample) for sample in expected]
    assert table["n_key_experts"] == [len({neuron[:2] for neuron in sample}) for sample in expected]
    shares = [n / len(sample) for n, sample in zip(shared, expected, strict=True)]
    assert table["shared_share"] == (shares if report.layout.is_shared.any() else [None] * len(expected))

    n_tokens = [len(values) for values in log_likelihoods]
    losses = [-sum(values) for values in log_likelihoods]
    assert report.tasks["b"].loss == pytest.approx(sum(losses[2:]) / sum(n_tokens[2:]), rel=1e-5)
    assert report.pooled.loss == pytest.approx(sum(losses) / sum(n_tokens), rel=1e-5)
    own = [loss / n for loss, n in zip(losses, n_tokens, strict=True)]
    assert table["loss"] == pytest.approx(own, rel=1e-5)


def test_contribution_mass_equals_the_loops(model: nn.Module, naive: Naive) -> None:
    layers, _ = naive
    report = MUIProbe(model, ProbeSet({"all": make_samples()}), rules=f"top_fraction={TOP_FRACTION}").measure()
    expected: dict[str, float] = dict.fromkeys(report.layout.expert_labels, 0.0)
    for layer in layers:
        for sample in layer.scores:
            for (_, expert, _), value in sample.items():
                expected[f"L{layer.layer}-{expert[0]}{int(expert[1:])}"] += abs(value)
    for label, value in zip(report.layout.expert_labels, report.pooled.mass, strict=True):
        assert value == pytest.approx(expected[label], rel=1e-5, abs=1e-6)

    shared_mass = report.estimate("shared_mass_share")
    assert (None if shared_mass is None else shared_mass.value) == pytest.approx(report.pooled.shared_mass_share)
    for number, (routed, shared) in enumerate(report.counts.sample_mass):
        for kind, value in (("E", routed), ("S", shared)):
            terms = [
                abs(f) for layer in layers for (_, expert, _), f in layer.scores[number].items() if expert[0] == kind
            ]
            assert value == pytest.approx(sum(terms), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_conservation_identity(model: nn.Module, implementation: str) -> None:
    """Σ f = ⟨output of the layer, W_head[y]⟩ less the output biases: true only if the right tensors were read."""
    model = copy.deepcopy(model)
    model.set_experts_implementation(implementation)
    assert_conserved(model, make_samples())


def test_layers_are_those_of_the_module_path(model: nn.Module, family: str) -> None:
    layout = MUIProbe(model, ProbeSet({"a": make_samples()})).layout
    # the first layer of this DeepSeek-V3 is dense
    assert [layer.layer for layer in layout.layers] == ([1, 2] if family == "deepseek_v3" else [0, 1])
    shared = {"qwen2_moe": (8, 8), "deepseek_v3": (8,)}
    assert all(layer.shared_widths == shared.get(family, ()) for layer in layout.layers)

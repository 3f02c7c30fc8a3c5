"""The options that make a dense model's key neurons those of the reference code of arXiv 2504.07440.

That code takes the output of the activation function at the position of each response token, times the logit of this
very token that a neuron's column of the down projection amounts to, ranks all entries of a sample in a layer, and
unites the neurons of the highest over samples. Written down here once more, from that description, with loops.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mui_callback import MUIProbe, ProbeSet
from mui_callback.errors import ProbeError, UnsupportedModelError
from mui_callback.probe.samples import TokenSample
from plain_moe import ZOO, build_plain
from test_dense import dense_model
from tiny import build
from tiny_samples import make_samples

REFERENCE: dict[str, Any] = {"activation": "gate", "alignment": "same"}


def measured(model: nn.Module, rule: str = "top_fraction=0.05", **options: Any) -> Any:
    return MUIProbe(model, ProbeSet({"a": make_samples()}), rules=rule, **options).measure()


def inputs_of_mlps(model: Any, sample: TokenSample) -> list[torch.Tensor]:
    """Input of each layer's MLP at all positions, float64 ``[T, D]``."""
    inputs: list[torch.Tensor] = []
    handles = [
        layer.mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0].double()))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(torch.tensor(sample.input_ids)[None])
    for handle in handles:
        handle.remove()
    return inputs


def scores_by_hand(model: Any, sample: TokenSample, *, gate: bool, same: bool) -> list[dict[tuple[int, int], float]]:
    """For each layer, the score of each (token, neuron)."""
    head = model.lm_head.weight.detach().double()
    found = []
    for layer, x_TD in zip(model.model.layers, inputs_of_mlps(model, sample), strict=True):
        w_gate, w_up, w_down = (
            getattr(layer.mlp, name).weight.detach().double() for name in ("gate_proj", "up_proj", "down_proj")
        )
        scores = {}
        for t in np.flatnonzero(sample.scored).tolist():
            x_D, y_D = x_TD[t if same else t - 1], head[sample.input_ids[t]]
            for j in range(w_gate.shape[0]):
                a = F.silu(w_gate[j] @ x_D) * (1.0 if gate else w_up[j] @ x_D)
                scores[t, j] = float(a * (w_down[:, j] @ y_D))
        found.append(scores)
    return found


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("same", [True, False])
def test_key_neurons_of_a_llama_are_those_of_the_reference(gate: bool, same: bool) -> None:
    model = dense_model("llama")
    expected = set()
    for sample in make_samples():
        for number, scores in enumerate(scores_by_hand(model, sample, gate=gate, same=same)):
            n_neurons = model.model.layers[number].mlp.gate_proj.out_features
            highest = sorted(scores, key=lambda entry: -scores[entry])[: max(1, math.floor(0.05 * n_neurons))]
            expected |= {(number, "E0", j) for _, j in highest}
    options = {"activation": "gate" if gate else "product", "alignment": "same" if same else "next"}
    report = measured(model, dense=True, **options)
    assert {tuple(neuron) for neuron in report.key_neurons()} == expected


def test_what_is_not_asked_of_the_options_stays() -> None:
    """Losses are those of the next token, and the identity is that of the real activations."""
    model = dense_model("llama")
    plain, reference = measured(model, dense=True), measured(model, dense=True, **REFERENCE)
    assert reference.pooled.loss == plain.pooled.loss
    assert reference.pooled.token_accuracy == plain.pooled.token_accuracy
    assert reference.identity_error < 1e-5
    assert reference.key_neurons() != plain.key_neurons()
    assert reference.settings != plain.settings


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "deepseek_v3"])
def test_stacked_and_shared_experts_keep_their_identity(family: str) -> None:
    product, gate = measured(build(family)), measured(build(family), activation="gate")
    assert gate.identity_error == product.identity_error
    assert np.array_equal(product.counts.routed, gate.counts.routed)
    assert not np.isclose(product.counts.mass, gate.counts.mass).any(where=product.counts.routed > 0)


def test_masses_of_stacked_experts_by_hand() -> None:
    model: Any = build("olmoe")
    report = measured(model, activation="gate")
    head = model.lm_head.weight.detach().double()
    mass = np.zeros(report.layout.n_experts)
    for sample in make_samples():
        for number, (layer, x_TD) in enumerate(zip(model.model.layers, inputs_of_mlps(model, sample), strict=True)):
            experts, gate = layer.mlp.experts, layer.mlp.gate
            with torch.no_grad():
                _, weight_TK, expert_TK = gate(x_TD.float())
            half = experts.gate_up_proj.shape[1] // 2
            for t in np.flatnonzero(sample.scored).tolist():
                for weight, expert in zip(weight_TK[t - 1].tolist(), expert_TK[t - 1].tolist(), strict=True):
                    w_gate = experts.gate_up_proj[expert, :half].detach().double()
                    a_I = F.silu(w_gate @ x_TD[t - 1])
                    f_I = weight * a_I * (head[sample.input_ids[t]] @ experts.down_proj[expert].detach().double())
                    mass[number * report.layout.layers[0].n_experts + expert] += float(f_I.abs().sum())
    assert report.counts.mass[0] == pytest.approx(mass, rel=1e-4)


def test_experts_without_a_gate_have_one_activation() -> None:
    model = dense_model("gpt2")
    assert measured(model, dense=True, activation="gate").key_neurons() == measured(model, dense=True).key_neurons()


def test_experts_that_make_their_activations_in_another_way_are_refused() -> None:
    with pytest.raises(ProbeError, match=r"activation='gate' wants activations of the form act\(x·W_g\)·\(x·W_u\)"):
        measured(build("gpt_oss"), activation="gate")


def test_activation_functions_that_are_no_modules_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"expected one module named act_fn, activation_fn, act or activa"):
        measured(build_plain(next(iter(ZOO))), activation="gate")

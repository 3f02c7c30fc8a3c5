"""Dense layers as layers of one expert, on the same footing as MoE layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mui_callback import MUIProbe, MUIReport, ProbeSet
from mui_callback.errors import NoExpertsError
from mui_callback.experts.discover import find_expert_layers
from reading import assert_conserved, layer_scores
from tiny import VOCAB, build
from tiny_samples import make_samples

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 128),
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Where the MLP is, and its neurons.
FAMILIES = {
    "llama": ("model.layers.{}.mlp", 48),
    "gemma2": ("model.layers.{}.mlp", 48),
    "phi3": ("model.layers.{}.mlp", 48),  # gate and up in one
    "gpt2": ("transformer.h.{}.mlp", 48),  # transposed weights with biases
    "gpt_neox": ("gpt_neox.layers.{}.mlp", 48),  # beside the attention
    "bloom": ("transformer.h.{}.mlp", 128),  # adds the residual itself
    "opt": ("model.decoder.layers.{}", 48),  # no module of its own
    "bart": ("model.decoder.layers.{}", 48),  # and a norm after the residual
}


def dense_model(family: str) -> nn.Module:
    defaults = AutoConfig.for_model(family)
    sizes = {name: value for name, value in SIZES.items() if hasattr(defaults, name)}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(type(defaults)(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms are trivial at first
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def measure(model: nn.Module, *, dense: bool = True) -> MUIReport:
    return MUIProbe(model, ProbeSet({"a": make_samples()}), rules="top_fraction=0.05", dense=dense).measure()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_layer_is_one_expert_and_conserves_its_output(family: str) -> None:
    model = dense_model(family)
    assert_conserved(model, make_samples(), dense=True)
    path, width = FAMILIES[family]
    layers = measure(model).layout.layers
    assert [(layer.layer, layer.path) for layer in layers] == [(n, path.format(n)) for n in (0, 1)]
    assert {(layer.n_routed, layer.routed_width, layer.shared_widths) for layer in layers} == {(1, width, ())}


def test_contributions_equal_the_loops() -> None:
    model, samples = dense_model("llama"), make_samples()
    fast = layer_scores(model, samples, dense=True)
    head = model.lm_head.weight.detach().double().numpy()
    for number, layer in enumerate(model.model.layers):
        inputs: list[torch.Tensor] = []
        handle = layer.mlp.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0][0]))
        for sample in samples:
            with torch.no_grad():
                model(torch.tensor(sample.input_ids)[None])
        handle.remove()
        gate_IN, up_IN, down_NI = (
            getattr(layer.mlp, name).weight.detach().double().numpy() for name in ("gate_proj", "up_proj", "down_proj")
        )
        for sample, x_TN, scores in zip(samples, inputs, fast[number], strict=True):
            n_scored = 0
            for t in np.flatnonzero(sample.scored):
                x_N, y_N = x_TN[t - 1].double().numpy(), head[sample.input_ids[t]]
                gate_I = gate_IN @ x_N
                expected_I = gate_I / (1 + np.exp(-gate_I)) * (up_IN @ x_N) * (y_N @ down_NI)
                found_I = [scores[n_scored, "E000", j] for j in range(48)]
                assert found_I == pytest.approx(expected_I, abs=1e-5 * np.abs(expected_I).max())
                n_scored += 1
            assert len(scores) == n_scored * 48


def test_dense_layers_of_a_moe_model() -> None:
    model = build("deepseek_v3")
    without, with_dense = measure(model, dense=False), measure(model)
    assert [layer.layer for layer in without.layout.layers] == [1, 2]
    assert [layer.layer for layer in with_dense.layout.layers] == [0, 1, 2]
    assert with_dense.layout.layers[1:] == without.layout.layers
    assert {neuron for neuron in with_dense.key_neurons() if neuron.layer} == without.key_neurons()
    assert {neuron.expert for neuron in with_dense.key_neurons() if neuron.layer == 0} == {"E0"}


def test_a_dense_model_is_only_probed_on_demand() -> None:
    with pytest.raises(NoExpertsError, match=r"can be probed with dense=True"):
        measure(dense_model("llama"), dense=False)


def test_a_model_without_mlps_says_what_was_looked_for() -> None:
    with pytest.raises(NoExpertsError, match=r"Linear has no MLP that can be probed: looked among its 1 modules"):
        find_expert_layers(nn.Linear(3, 3), dense=True)

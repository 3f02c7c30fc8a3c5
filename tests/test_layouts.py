"""Layouts beyond the six families of `tiny`: the conservation identity says whether they are read right."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from mui_callback import MUIProbe, ProbeSet
from reading import layer_scores
from tiny import VOCAB, build
from tiny_samples import make_samples

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "n_routed_experts": 8,
    "num_experts": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 24,
    "moe_latent_size": 16,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# What is special about it, and its shared experts.
LAYOUTS = {
    "axk1": ("a norm on the block's output", (16, 16)),
    "granitemoeshared": ("shared MLP outside the block, as shared_mlp", (32,)),
    "hunyuan_v1_moe": ("shared_mlp inside the block", (64,)),
    "inkling_text": ("stacked shared experts, weighted by the router", (16, 16)),
    "laguna": ("a scaling factor behind the experts", (16, 16)),
    "nemotron_h": ("no gate, projections into and out of a latent space", (24,)),
    "qwen3_next": ("gated shared expert, linear attention", (16, 16)),
}


def config(family: str) -> Any:
    defaults = AutoConfig.for_model(family)
    text = defaults.get_text_config()
    sizes = {name: value for name, value in SMALL.items() if hasattr(text, name)}
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(getattr(text, name, None), list):
            sizes[name] = getattr(text, name)[:3]
    return type(text)(**sizes)


@pytest.mark.parametrize("family", list(LAYOUTS))
def test_conservation_identity(family: str) -> None:
    model = build(config(family))
    totals, outputs = layer_scores(model, make_samples(), conservation=True)
    assert totals
    for total, output in zip(totals, outputs, strict=True):
        assert torch.linalg.norm(total - output) < 1e-5 * torch.linalg.norm(output)
    report = MUIProbe(model, ProbeSet({"a": make_samples()}), top_fraction=0.02).measure()
    assert all(layer.shared_widths == LAYOUTS[family][1] for layer in report.layout.layers)
    assert 0 < report.mui < 1


class Wrapper(torch.nn.Module):
    """As torch's checkpoint wrapper: another module around a decoder layer."""

    def __init__(self, wrapped: torch.nn.Module) -> None:
        super().__init__()
        self._checkpoint_wrapped_module = wrapped

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._checkpoint_wrapped_module(*args, **kwargs)


@pytest.mark.parametrize("wrap", [Wrapper, partial(torch.compile, backend="eager")])
def test_wrapped_layers_are_read_like_bare_ones(wrap: Any) -> None:
    model = build(config("granitemoeshared"))
    bare = MUIProbe(model, ProbeSet({"a": make_samples()}), top_fraction=0.02).measure()
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = wrap(layer)
    wrapped = MUIProbe(model, ProbeSet({"a": make_samples()}), top_fraction=0.02).measure()
    assert [layer.shared_widths for layer in wrapped.layout.layers] == [(32,)] * 3
    assert wrapped.key_neurons() == bare.key_neurons()


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_a_norm_after_each_expert(implementation: str) -> None:
    """As in Muse Spark, whose text model cannot be built alone: the same flag on another model's experts."""
    model = build("olmoe")
    model.set_experts_implementation(implementation)
    for layer in model.model.layers:
        experts = layer.mlp.experts
        experts.has_post_expert_norm = True
        experts.post_expert_norm = torch.nn.RMSNorm(24, eps=1e-6)
        torch.nn.init.normal_(experts.post_expert_norm.weight)
    totals, outputs = layer_scores(model, make_samples(), conservation=True)
    for total, output in zip(totals, outputs, strict=True):
        assert torch.linalg.norm(total - output) < 1e-5 * torch.linalg.norm(output)
    report = MUIProbe(model, ProbeSet({"a": make_samples()})).measure()
    losses = []
    for sample in make_samples():
        with torch.no_grad():  # the model's own forward knows the norm
            logits = model(input_ids=torch.tensor(sample.input_ids)[None]).logits[0].log_softmax(-1)
        losses += [-logits[t - 1, sample.input_ids[t]].item() for t in range(1, len(logits)) if sample.scored[t]]
    assert report.pooled.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)

"""What no family of transformers shows by itself: wrapped layers, and flags on other experts than usual."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import families
from mui_callback import MUIProbe, ProbeSet
from reading import assert_conserved
from tiny import build
from tiny_samples import make_samples


class Wrapper(torch.nn.Module):
    """As torch's checkpoint wrapper: another module around a decoder layer."""

    def __init__(self, wrapped: torch.nn.Module) -> None:
        super().__init__()
        self._checkpoint_wrapped_module = wrapped

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._checkpoint_wrapped_module(*args, **kwargs)


@pytest.mark.parametrize("wrap", [Wrapper, partial(torch.compile, backend="eager")])
def test_wrapped_layers_are_read_like_bare_ones(wrap: Any) -> None:
    model = families.build("granitemoeshared")
    bare = MUIProbe(model, ProbeSet({"a": make_samples()}), rules="top_fraction=0.02").measure()
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = wrap(layer)
    wrapped = MUIProbe(model, ProbeSet({"a": make_samples()}), rules="top_fraction=0.02").measure()
    assert [layer.shared_widths for layer in wrapped.layout.layers] == [(families.OWN,)] * 3
    assert wrapped.key_neurons() == bare.key_neurons()


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_a_norm_after_each_expert(implementation: str) -> None:
    """As in Muse Spark, with other implementations of the experts."""
    model = build("olmoe")
    model.set_experts_implementation(implementation)
    for layer in model.model.layers:
        experts = layer.mlp.experts
        experts.has_post_expert_norm = True
        experts.post_expert_norm = torch.nn.RMSNorm(24, eps=1e-6)
        torch.nn.init.normal_(experts.post_expert_norm.weight)
    assert_conserved(model, make_samples())
    report = MUIProbe(model, ProbeSet({"a": make_samples()})).measure()
    losses = []
    for sample in make_samples():
        with torch.no_grad():  # the model's own forward knows the norm
            logits = model(input_ids=torch.tensor(sample.input_ids)[None]).logits[0].log_softmax(-1)
        losses += [-logits[t - 1, sample.input_ids[t]].item() for t in range(1, len(logits)) if sample.scored[t]]
    assert report.pooled.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)

"""Masked neurons on a GPU, where other kernels multiply the experts than on a CPU."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mui_callback import MUIProbe, ProbeSet
from mui_callback.metrics.utilization import BoolArray
from mui_callback.probe.losses import Trial
from tiny import build, deepseek_v3, gpt_oss, olmoe, qwen2_moe
from tiny_samples import make_samples

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

# Strides of 16 bytes in bfloat16, so that the grouped kernel runs.
ALIGNED: dict[str, Any] = {
    "olmoe": lambda: olmoe(hidden_size=64, intermediate_size=32, num_experts=8),
    "qwen2_moe": lambda: qwen2_moe(hidden_size=64, moe_intermediate_size=16, shared_expert_intermediate_size=32),
    "deepseek_v3": lambda: deepseek_v3(hidden_size=64, moe_intermediate_size=16),
    "gpt_oss": lambda: gpt_oss(hidden_size=64, intermediate_size=32, head_dim=32),
}


def probe_of(model: nn.Module) -> MUIProbe:
    return MUIProbe(model, ProbeSet({"noise": make_samples(2, (17, 30, 24, 12))}), rules="top_fraction=0.05")


def by_hand(model: nn.Module, is_masked: BoolArray) -> nn.Module:
    """A copy of the model with columns of W_d set to zero."""
    other: Any = copy.deepcopy(model)
    rest = torch.from_numpy(is_masked).to("cuda")
    for layer in other.model.layers:
        if not hasattr(layer.mlp, "experts"):
            continue  # a dense layer
        stacked = layer.mlp.experts.down_proj.detach()
        is_transposed = layer.mlp.experts.__class__.__name__ == "GptOssExperts"
        shared = getattr(layer.mlp, "shared_expert", None) or getattr(layer.mlp, "shared_experts", None)
        columns = [weight.T if is_transposed else weight for weight in stacked]
        columns += [] if shared is None else [shared.down_proj.weight.detach()]
        for weight_DI in columns:
            own, rest = rest.tensor_split([weight_DI.shape[1]])
            weight_DI[:, own] = 0
    assert not len(rest)
    return other


@pytest.mark.parametrize("family", ALIGNED)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 0.0)])
def test_losses_are_those_of_weights_that_are_zero(family: str, dtype: torch.dtype, error: float) -> None:
    model = build(ALIGNED[family]()).to("cuda", dtype)
    probe, samples = probe_of(model), np.arange(4)
    is_masked = np.random.default_rng(0).random(probe.layout.n_neurons) < 0.4
    nothing = np.zeros_like(is_masked)
    masked, unmasked = probe.losses([Trial(samples, is_masked), Trial(samples, nothing)])
    (expected,) = probe_of(by_hand(model, is_masked)).losses([Trial(samples, nothing)])
    assert masked == pytest.approx(expected, abs=error)
    assert np.abs(masked - unmasked).min() > 1e-3
    assert np.array_equal(unmasked, probe.measure().counts.loss)


@pytest.mark.parametrize("what", ["neurons", "experts"])
def test_the_check_is_that_of_the_cpu(what: Any) -> None:
    model = build(ALIGNED["qwen2_moe"]())
    report = probe_of(model).measure()
    expected = probe_of(model).ablate(report, what=what).tasks["noise"].changes
    found = probe_of(model.to("cuda")).ablate(report, what=what).tasks["noise"].changes
    assert expected is not None
    assert found is not None
    for name in ("key", "random", "difference"):
        assert getattr(found, name).value == pytest.approx(getattr(expected, name).value, abs=1e-4)

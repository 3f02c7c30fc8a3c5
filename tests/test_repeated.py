"""A probe that is made again gives the same to the bit, whatever went before: a pass that failed, a training step."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tiny
from backends import language_loss
from distributed_training import launch
from mui_callback import MUIProbe, MUIReport, ProbeSet
from mui_callback.counts import ProbeCounts
from plain_moe import NormedMLP, build_plain
from repeated_probes import Passes, in_processes, measure_again_and_again
from tiny_samples import make_samples

MODELS: dict[str, Any] = {
    "qwen2_moe": lambda: tiny.build("qwen2_moe"),
    "gpt_oss": lambda: tiny.build("gpt_oss"),
    "lists": lambda: build_plain("qwen2"),
    "norms in experts": lambda: build_plain("expert_norm"),
    "latent": lambda: build_plain("latent"),
    "experts choose": lambda: build_plain("expert_choice"),
}


def assert_same_to_the_bit(one: MUIReport, other: MUIReport) -> None:
    for field in fields(ProbeCounts):
        found, expected = getattr(one.counts, field.name), getattr(other.counts, field.name)
        if field.name == "key_sets":
            for ours, theirs in zip(found, expected, strict=True):
                assert np.array_equal(ours.neuron, theirs.neuron)
                assert np.array_equal(ours.end, theirs.end)
        else:
            assert np.array_equal(found, expected), field.name


def assert_nothing_is_left(passes: Passes) -> None:
    assert_same_to_the_bit(passes.first, passes.second)
    assert_same_to_the_bit(passes.first, passes.third)
    assert_same_to_the_bit(passes.fourth, passes.fresh)
    assert passes.fourth.pooled.loss != passes.first.pooled.loss  # it is another model


def _train(model: nn.Module, input_ids: Tensor) -> None:
    language_loss(model(input_ids), input_ids).backward()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.grad is not None:
                weight -= weight.grad.sign() * 1e-2


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layer", [0, -1])
def test_a_process_alone(name: str, layer: int) -> None:
    model = MODELS[name]()
    passes = measure_again_and_again(model, lambda ids: _train(model, ids), fails=True, layer=layer)
    assert passes.error == "ArithmeticError: injected"
    assert_nothing_is_left(passes)


def test_a_scale_behind_the_experts_that_is_trained_away_from_ones() -> None:
    """At first it looks like a weight that is the same for all channels."""
    model, samples = build_plain("expert_norm"), ProbeSet({"a": make_samples()})
    scales = [module.norm.weight for module in model.modules() if isinstance(module, NormedMLP)]
    with torch.no_grad():
        for scale in scales:
            scale.fill_(1)
        probe = MUIProbe(model, samples, rules="top_fraction=0.05")
        first = probe.measure()
        for scale in scales:
            scale += 1e-3 * torch.randn_like(scale)
    again, fresh = probe.measure(), MUIProbe(model, samples, rules="top_fraction=0.05").measure()
    assert_same_to_the_bit(again, fresh)
    assert again.identity_error is not None
    assert again.identity_error < 1e-5
    assert not np.allclose(again.counts.mass, first.counts.mass, rtol=1e-5)


@pytest.mark.parametrize("amount", [8e-3, 0.1])
def test_scales_that_the_first_batch_does_not_reach(amount: float) -> None:
    """Behind experts that only longer samples are sent to, and the samples of the first batch are the shortest."""
    model, samples = build_plain("expert_norm"), make_samples()
    experts = [module for module in model.modules() if isinstance(module, NormedMLP)]
    reached: set[nn.Module] = set()
    handles = [
        expert.register_forward_hook(lambda module, args, out: reached.add(module) if args[0].numel() else None)
        for expert in experts
    ]
    shortest = min(samples, key=lambda sample: len(sample.input_ids))
    with torch.no_grad():
        for expert in experts:
            expert.norm.weight.fill_(1)
        model(torch.tensor(shortest.input_ids)[None])
        for handle in handles:
            handle.remove()
        assert set(experts) - reached
        for expert in set(experts) - reached:
            expert.norm.weight += amount * torch.randn_like(expert.norm.weight)
    sets = ProbeSet({"a": samples})
    one_batch, many = (
        MUIProbe(model, sets, rules="top_fraction=0.05", batch_tokens=size).measure() for size in (10**6, 1)
    )
    assert many.key_neurons() == one_batch.key_neurons()
    assert many.counts.mass == pytest.approx(one_batch.counts.mass, rel=1e-4)


@pytest.mark.parametrize(("name", "fails_in"), [("ddp", 1), ("moe_k2", 1), ("autoep", 0)])
def test_several_processes_of_which_one_fails(name: str, fails_in: int, tmp_path: Path) -> None:
    both = launch(tmp_path, in_processes, name=name, fails_in=fails_in)
    for rank, passes in enumerate(both):
        told = "ArithmeticError: injected"
        assert passes.error == (told if rank == fails_in else f"ProbeError: process {fails_in}: {told}")
        assert_nothing_is_left(passes)
        assert_same_to_the_bit(passes.second, both[0].second)

"""Everything that a forward can leave behind is put back: after success, and after an exception."""

from __future__ import annotations

import contextlib
import random
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from families import build as build_family
from mui_callback import MUIProbe, ProbeSet
from mui_callback.errors import ProbeError
from mui_callback.probe.freeze import frozen
from tiny import build
from tiny_samples import make_samples


class Leaky(nn.Module):
    """Leaves every kind of trace that was seen in real models."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("load", torch.zeros(3))
        self.register_buffer("inv_freq", torch.ones(2), persistent=False)
        self.dropout = nn.Dropout(0.5)
        self.l_aux: Tensor | None = None
        self.counter = torch.zeros(())
        self.longest = 7
        self.losses: list[Tensor] = []
        self.cache: dict[str, int] = {"a": 1}
        self.generator = torch.Generator()
        self.config = SimpleNamespace(seen=0)

    def forward(self, x: Tensor) -> Tensor:
        self.load += 1
        self.register_buffer("inv_freq", torch.full((4,), 9.0), persistent=False)
        self.l_aux = x.sum()
        self.counter.add_(1)
        self.longest = 99
        self.load.data += 1  # unseen by the version counter
        self.losses.append(x)
        self.cache |= {"a": 2, "b": 3}
        torch.rand(1, generator=self.generator)
        self.config.seen += 1
        self.new_attribute = x
        random.random()
        np.random.rand()  # noqa: NPY002
        return self.dropout(x) + torch.rand_like(x)


def snapshot(module: nn.Module) -> dict[str, object]:
    return {
        "modes": [m.training for m in module.modules()],
        "buffers": {name: buffer.clone() for name, buffer in module.named_buffers()},
        "buffer ids": {name: id(buffer) for name, buffer in module.named_buffers()},
        "attributes": sorted(vars(module)),
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()],
        "grads": [p.grad for p in module.parameters()],
        "versions": [p._version for p in module.parameters()],
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()),  # noqa: NPY002
        "grad mode": torch.is_grad_enabled(),
    }


def same(first: object, second: object) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return first == second


@pytest.mark.parametrize("fails", [False, True])
def test_no_trace_of_a_forward(fails: bool) -> None:
    module = Leaky().train()
    module.dropout.eval()  # a frozen part: each module has a mode of its own
    before = snapshot(module)
    with contextlib.suppress(RuntimeError), frozen(module):
        assert not any(m.training for m in module.modules())
        module(torch.ones(3))
        if fails:
            raise RuntimeError
    assert same(snapshot(module), before)
    assert module.l_aux is None
    assert module.longest == 7
    assert module.counter == 0
    assert module.losses == []
    assert module.cache == {"a": 1}
    assert torch.equal(module.generator.get_state(), torch.Generator().get_state())
    assert module.config.seen == 0


def test_a_parameter_that_a_forward_writes_to_is_reported() -> None:
    class SelfNormalising(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.weight.data.div_(self.weight.data.norm())
            with torch.no_grad():
                self.weight.mul_(1.0)
            return super().forward(x)

    module = SelfNormalising(2, 2)
    with pytest.raises(ProbeError, match="wrote to parameters, which cannot be undone: weight"), frozen(module):
        module(torch.ones(2))


def test_backward_hooks_of_users_do_not_see_a_probe() -> None:
    model = build("qwen2_moe")
    calls: list[int] = []
    for layer in model.model.layers:
        layer.mlp.shared_expert.register_full_backward_hook(lambda *_: calls.append(1))
    MUIProbe(model, ProbeSet({"a": make_samples()})).measure()
    assert not calls
    model(input_ids=torch.arange(3, 9)[None]).logits.sum().backward()
    assert len(calls) == 2


def test_train_and_eval_are_not_called() -> None:
    """Adapters merge their weights there."""
    calls: list[bool] = []

    class Merging(nn.Linear):
        def train(self, mode: bool = True) -> nn.Module:
            calls.append(mode)
            return super().train(mode)

    module = Merging(2, 2)
    with frozen(module):
        assert not module.training
        module(torch.ones(2))
    assert module.training
    assert calls == []


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "gpt_oss"])
def test_no_trace_of_a_probe(family: str, fails: bool) -> None:
    model = build(family).train()
    registry = __import__("transformers").integrations.moe.ALL_EXPERTS_FUNCTIONS
    implementation, functions = model.config._experts_implementation, set(registry)
    probe = MUIProbe(model, ProbeSet({"a": make_samples()}))
    if fails:
        # raised between the hooks of a layer, where gradients are switched on
        model.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("injected")))
    before = snapshot(model)
    if fails:
        with pytest.raises(RuntimeError, match="injected"):
            probe.measure()
    else:
        probe.measure()
    assert same(snapshot(model), before)
    assert model.config._experts_implementation == implementation
    assert set(registry) == functions


def test_a_failure_inside_the_tail_leaves_gradients_as_they_were() -> None:
    """Between the experts and the end of the block gradients are on: the worst place to raise."""
    model = build("qwen2_moe").train()
    gate = model.model.layers[0].mlp.shared_expert_gate
    probe = MUIProbe(model, ProbeSet({"a": make_samples()}))
    seen = []

    def fail(*_: object) -> None:
        seen.append(torch.is_grad_enabled())
        raise RuntimeError("injected")

    handle = gate.register_forward_pre_hook(fail)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="injected"):
            probe.measure()
        assert not torch.is_grad_enabled()
    with pytest.raises(RuntimeError, match="injected"):
        probe.measure()
    assert torch.is_grad_enabled()
    assert seen == [True, True]
    handle.remove()
    probe.measure()


def test_an_autocast_around_the_probe_still_trains() -> None:
    """Weights cast under no_grad must not stay in the autocast cache: training would lose their gradients."""
    model = build("qwen2_moe").train()
    probe = MUIProbe(model, ProbeSet({"a": make_samples()}))
    ids = torch.arange(3, 13)[None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        probe.measure()
        model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "self_attn" in name)


def test_an_interrupt_leaves_no_trace() -> None:
    """Ctrl-C in a notebook: not an `Exception`, so torch's own hooks do not run."""
    model = build_family("llama4")
    probe = MUIProbe(model, ProbeSet({"a": make_samples()}))
    act = model.model.layers[1].feed_forward.experts.act_fn

    def interrupt(module: Any, args: Any) -> None:
        raise KeyboardInterrupt

    handle = act.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        probe.measure()
    handle.remove()
    assert torch.is_grad_enabled()
    model(input_ids=torch.arange(3, 9)[None]).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.model.layers[1].feed_forward.experts.parameters())


def test_containers_in_containers_are_restored() -> None:
    model = build("olmoe")
    block = model.model.layers[0].mlp
    block.stats = defaultdict(list, {"aux": [torch.zeros(2)], "count": [0]})
    block.array = np.zeros(3)
    block.loop = [block.array]
    block.loop.append(block.loop)

    def write(module: Any, args: Any) -> None:
        module.stats["aux"].append(args[0].sum())
        module.stats["aux"][0].add_(1)
        module.stats["new"].append(1)
        module.array += 1

    block.register_forward_pre_hook(write)
    MUIProbe(model, ProbeSet({"a": make_samples()})).measure()
    assert list(block.stats) == ["aux", "count"]
    assert len(block.stats["aux"]) == 1
    assert block.stats["aux"][0].tolist() == [0, 0]
    assert block.array.tolist() == [0, 0, 0]
    assert len(block.loop) == 2


def test_global_backward_hooks_do_not_see_the_probe() -> None:
    calls: list[str] = []
    handle = torch.nn.modules.module.register_module_full_backward_hook(lambda *args: calls.append("called"))
    try:
        model = build("qwen2_moe")
        MUIProbe(model, ProbeSet({"a": make_samples()})).measure()
        assert calls == []
        model(input_ids=torch.arange(3, 9)[None]).logits.sum().backward()
        assert calls
    finally:
        handle.remove()


def test_making_a_probe_leaves_no_trace() -> None:
    """A weight that is computed when it is looked at may draw random numbers or count its uses."""
    model = build("qwen2_moe").train()
    torch.nn.utils.parametrizations.spectral_norm(model.model.layers[0].mlp.shared_expert.down_proj)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    MUIProbe(model, ProbeSet({"a": make_samples()})).measure()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


class ParamWrapper(torch.nn.Module):
    """As an adapter on a stacked weight: it writes the weight back as it was, in every forward."""

    def __init__(self, base_layer: torch.nn.Module) -> None:
        super().__init__()
        self.base_layer, self.change = base_layer, 0.0

    def forward(self, *args: Any) -> Any:
        with torch.no_grad():
            self.base_layer.down_proj.add_(self.change)
        return self.base_layer(*args)


def test_a_parameter_that_is_written_back_as_it_was() -> None:
    model = build("olmoe")
    block = model.model.layers[0].mlp
    block.experts = ParamWrapper(block.experts)
    probe = MUIProbe(model, ProbeSet({"a": make_samples()}))
    assert probe.measure().mui > 0
    block.experts.change = 0.01
    with pytest.raises(ProbeError, match=r"wrote to parameters.*base_layer\.down_proj"):
        probe.measure()


def cached_mask(module: nn.Module, args: Any) -> None:
    """As some models keep what they need again: an expanded tensor, which cannot be written to."""
    module.mask = torch.ones(1, 4).expand(3, 4)


@pytest.mark.parametrize("when", ["before", "inside"])
def test_what_cannot_be_written_to_is_no_hindrance(when: str) -> None:
    module = nn.Linear(4, 4)
    module.table = np.broadcast_to(np.ones(1), (5,))
    if when == "before":
        cached_mask(module, None)
    module.register_forward_pre_hook(cached_mask)
    with frozen(module):
        module(torch.ones(2, 4))
    assert module.training
    assert hasattr(module, "mask") == (when == "before")


def test_everything_is_restored_though_one_thing_cannot_be() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4))
    module[0].mask = torch.ones(1, 4).expand(3, 4)
    module[1].seen = [1]

    def disturb() -> None:
        with frozen(module):
            module[0].mask._base.mul_(2)  # an expanded tensor can only be written to in this way
            module[1].seen.append(2)
            module[2].training = True
            module[2](torch.randn(3, 4))

    with pytest.raises(RuntimeError, match="single memory location"):
        disturb()
    assert all(part.training for part in module.modules())
    assert module[1].seen == [1]
    assert module[2].num_batches_tracked == 0


def test_a_buffer_that_waits_for_a_backward_pass_is_not_touched() -> None:
    module = nn.Linear(4, 4)
    module.register_buffer("scale", torch.full((4,), 2.0))
    loss = (module(torch.ones(2, 4)) * module.scale).sum()
    version = module.scale._version
    with frozen(module):
        module(torch.ones(2, 4))
    assert module.scale._version == version
    loss.backward()
    assert module.weight.grad is not None
    assert module.weight.grad.tolist() == [[4.0] * 4] * 4  # two rows of ones, scaled by 2


class Renaming(nn.Module):
    """Has as many attributes after a forward as before, and the same values in the same order."""

    def __init__(self) -> None:
        super().__init__()
        self.before = None
        self.one, self.other = 1, 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        del self.before, self.one, self.other
        self.after = None
        self.other, self.one = 1, 2
        return x


@pytest.mark.parametrize("training", [True, False])
def test_names_of_attributes_are_restored(training: bool) -> None:
    module = Renaming().train(training)
    with frozen(module):
        module(torch.ones(1))
        assert "before" not in vars(module)
        assert (module.one, module.other) == (2, 1)
    assert (module.one, module.other) == (1, 2)
    assert "before" in vars(module)
    assert "after" not in vars(module)

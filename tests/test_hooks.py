"""Between probes nothing hangs on the model: no hook, no attribute, no function in place of another."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers import AutoModelForCausalLM, LlamaConfig

from families import build as build_family
from mui_callback import MUIProbe, ProbeSet
from mui_callback.probe.losses import Trial
from mui_callback.probe.samples import TokenChoice, TokenSample
from plain_moe import build_plain
from tiny import VOCAB, build, drawn
from tiny_samples import make_samples


def dense() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 2}
    return drawn(AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=2)), 0)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "qwen2_moe": lambda: build("qwen2_moe"),
    "gpt_oss": lambda: build("gpt_oss"),
    "deepseek_v3": lambda: build("deepseek_v3"),
    "qwen3_next": lambda: build_family("qwen3_next"),
    "plain list of experts": lambda: build_plain("qwen2"),
    "plain, experts that choose": lambda: build_plain("expert_choice"),
    "dense": dense,
    "encoder-decoder": lambda: build_family("switch_transformers"),
}


def probe_set() -> ProbeSet:
    """Samples with and without choices, enough of them to run prompts once for all of their choices."""
    rng = np.random.default_rng(5)
    asked = []
    for number in range(12):
        prompt = rng.integers(3, VOCAB, 40 + number % 3)
        ids = [np.append(prompt, rng.integers(3, VOCAB, length)) for length in (2, 4, 3, 3)]
        choices = tuple(TokenChoice(one, np.arange(len(one)) >= len(prompt)) for one in ids)
        asked.append(TokenSample(str(number), ids[0], choices[0].scored, choices=choices, answer=1))
    return ProbeSet({"text": make_samples(lengths=(11, 7, 14)), "asked": asked})


def identities(value: Any) -> Any:
    """What an attribute is; of a container also what is in it."""
    if isinstance(value, dict):
        return id(value), [(key, id(held)) for key, held in value.items()]
    if isinstance(value, list | set):
        return id(value), list(map(id, value))
    return value if isinstance(value, bool | int | float | str) else id(value)


def attributes(owner: Any) -> dict[str, Any]:
    return {name: identities(value) for name, value in vars(owner).items()}


def hung_up(model: nn.Module) -> dict[str, Any]:
    """Everything that a probe could hang up, on the model and beside it."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__ if cls is not object}
    sources = {sys.modules[cls.__module__] for cls in classes} | {torch, torch.nn.functional, torch.Tensor}
    registry = sys.modules["transformers.integrations.moe"].ALL_EXPERTS_FUNCTIONS
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    return {
        "modules": {path: attributes(module) for path, module in model.named_modules()},
        "parameters": {
            name: (attributes(p), p.grad, p.requires_grad, p._backward_hooks, p._post_accumulate_grad_hooks)
            for name, p in model.named_parameters()
        },
        "classes": {cls: attributes(cls) for cls in classes},
        "functions": {source: attributes(source) for source in sources},
        "global hooks": {name: identities(v) for name, v in vars(torch_module).items() if name.startswith("_global")},
        "configs": [{name: repr(value) for name, value in vars(config).items()} for config in configs],
        "experts functions": [(name, id(registry[name])) for name in registry],
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch._C._len_torch_function_stack()),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for what in before:
        assert after[what] == before[what], what


def nothing(*_: Any) -> None:
    pass


@pytest.fixture
def hook_on_all_modules() -> Iterator[None]:
    with torch_module.register_module_full_backward_hook(nothing), torch_module.register_module_forward_hook(nothing):
        yield


def with_hooks_of_its_own(model: nn.Module) -> nn.Module:
    """Training, with hooks of a user of every kind."""
    for module in list(model.modules())[1::3]:
        module.register_forward_hook(nothing, always_call=True)
        module.register_forward_pre_hook(nothing)
        module.register_full_backward_hook(nothing)
        module.register_full_backward_pre_hook(nothing)
    next(model.parameters()).register_post_accumulate_grad_hook(nothing)
    return model.train()


@pytest.mark.usefixtures("hook_on_all_modules")
@pytest.mark.parametrize("name", MODELS)
def test_no_hook_is_left_between_probes(name: str) -> None:
    model = with_hooks_of_its_own(MODELS[name]())
    before = hung_up(model)
    probe = MUIProbe(model, probe_set(), dense=name == "dense", rules="top_fraction=0.05")
    assert_same(before, hung_up(model))
    report = probe.measure()
    assert report.tasks["asked"].choice_accuracy is not None
    assert_same(before, hung_up(model))
    probe.verify(rounding=1)
    probe.ablate(report, draws=1)
    assert_same(before, hung_up(model))
    probe.losses([Trial(np.arange(3), np.arange(probe.layout.n_neurons) % 2 == 0)])
    assert_same(before, hung_up(model))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("failing", ["first", "second", "last"])
def test_no_hook_is_left_by_a_probe_that_fails(name: str, failing: str) -> None:
    """From its first forward, a later one or the last on, which is one of choices; and in losses under a mask."""
    model = MODELS[name]()
    head = next(module for path, module in model.named_modules() if path.rpartition(".")[2] == "lm_head")
    calls: list[int] = []
    fails_at = [10**6]

    def fail(*_: Any) -> None:
        calls.append(len(calls) + 1)
        if calls[-1] >= fails_at[0]:
            raise RuntimeError("injected")

    head.register_forward_pre_hook(fail)
    before = hung_up(model)
    probe = MUIProbe(model, probe_set(), dense=name == "dense", batch_tokens=2000)
    probe.measure()
    calls.clear()
    probe.measure()
    fails_at[0] = {"first": 1, "second": 2, "last": len(calls)}[failing]
    for measure in (
        probe.measure,
        lambda: probe.losses([Trial(np.arange(3), np.zeros(probe.layout.n_neurons, dtype=bool))] * 99),
    ):
        calls.clear()
        with pytest.raises(RuntimeError, match="injected"):
            measure()
        assert_same(before, hung_up(model))

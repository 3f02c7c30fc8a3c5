"""Masked neurons write nothing: the same as a model whose columns of the down projections were set to zero by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import families
import tiny
from mui_callback.errors import ProbeError
from mui_callback.experts.discover import find_expert_layers
from mui_callback.experts.layer import layout_of
from mui_callback.experts.masking import masked
from mui_callback.metrics.utilization import BoolArray
from plain_moe import E, GatedMLP, build_plain
from test_dense import dense_model

CPU = torch.device("cpu")
# What makes the columns of W_d, one row for each neuron [neurons, D], of a weight as it is kept
KEPT: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "[E, D, I]": lambda weight: [expert.T for expert in weight],
    "[E, I, D]": list,
    "[E·I, D]": lambda weight: [weight],
    "[I, D]": lambda weight: [weight],
    "[D, I]": lambda weight: [weight.T],
}
STACKED, TRANSPOSED = ("experts.down_proj", "[E, D, I]"), ("experts.down_proj", "[E, I, D]")


def linear(path: str) -> tuple[str, str]:
    return f"{path}.weight", "[D, I]"


def listed(path: str) -> list[tuple[str, str]]:
    return [linear(path.format(expert)) for expert in range(E)]


# Where each layer is, the numbers of the layers, and the down projections in it: routed ones, then shared ones.
Weights = tuple[str, tuple[int, ...], list[tuple[str, str]]]
IN_MLP = "model.layers.{}.mlp."
WEIGHTS: dict[str, Weights] = {
    "olmoe": (IN_MLP, (0, 1), [STACKED]),
    "mixtral": (IN_MLP, (0, 1), [STACKED]),
    "qwen2_moe": (IN_MLP, (0, 1), [STACKED, linear("shared_expert.down_proj")]),
    "qwen3_moe": (IN_MLP, (0, 1), [STACKED]),
    "deepseek_v3": (IN_MLP, (1, 2), [STACKED, linear("shared_experts.down_proj")]),
    "gpt_oss": (IN_MLP, (0, 1), [TRANSPOSED]),
    "aria": (IN_MLP, (0, 1, 2), [TRANSPOSED, linear("shared_experts.down_proj")]),
    "dbrx": ("transformer.blocks.{}.ffn.", (0, 1, 2), [("experts.mlp.w2", "[E·I, D]")]),
    "gemma4": ("model.layers.{}.", (0, 1, 2, 3), [STACKED, linear("mlp.down_proj")]),
    "inkling": (IN_MLP, (1, 2), [STACKED, ("shared_experts.down_proj", "[E, D, I]")]),
    "jetmoe": (IN_MLP, (0, 1, 2), [("output_linear.weight", "[E, D, I]")]),
    "llama4": ("model.layers.{}.feed_forward.", (1, 3), [TRANSPOSED, linear("shared_expert.down_proj")]),
    "longcat_flash": (IN_MLP, (0, 1, 2), [STACKED]),
    "muse_spark": ("model.language_model.layers.{}.mlp.", (1, 2), [STACKED]),
    "nemotron_h": ("model.layers.{}.mixer.", (1, 3), [STACKED, linear("shared_experts.down_proj")]),
    "switch_transformers": (
        "decoder.block.{}.layer.2.mlp.",
        (1, 3),
        [linear(f"experts.expert_{expert}.wo") for expert in range(families.EXPERTS)],
    ),
    "plain deepseek_v1": (
        "layers.{}.mlp.",
        (1, 2),
        [*listed("experts.{}.down_proj"), linear("shared_experts.down_proj")],
    ),
    "plain dense_all": ("layers.{}.moe.", (0, 1, 2), listed("experts.{}.down_proj")),
    "plain expert_choice": ("layers.{}.moe.", (0, 1, 2), listed("experts.{}.down_proj")),
    "plain gpt2": ("layers.{}.mlp.", (0, 1, 2), [(f"experts.{e}.c_proj.weight", "[I, D]") for e in range(E)]),
    "plain shared_list": (
        "layers.{}.ffn.",
        (1, 2),
        [*listed("moe.experts.mlps.{}.down_proj"), *(linear(f"shared_experts.{i}.down_proj") for i in range(2))],
    ),
    "dense llama": (IN_MLP, (0, 1), [linear("down_proj")]),
    "dense gpt2": ("transformer.h.{}.mlp.", (0, 1), [("c_proj.weight", "[I, D]")]),
    "dense opt": ("model.decoder.layers.{}.", (0, 1), [linear("fc2")]),
}
TINY = tuple(tiny.FAMILIES)


def build(name: str) -> nn.Module:
    kind, _, rest = name.rpartition(" ")
    if kind == "plain":
        return build_plain(rest)
    if kind == "dense":
        return dense_model(rest)
    return tiny.build(name) if name in TINY else families.build(name)


def columns(model: nn.Module, name: str) -> list[list[Tensor]]:
    """For each layer the columns of W_d of its experts, ``[neurons, D]`` each, to be written to."""
    prefix, numbers, weights = WEIGHTS[name]
    return [
        [part for path, kept in weights for part in KEPT[kept](model.get_parameter(prefix.format(n) + path).detach())]
        for n in numbers
    ]


def some_neurons(model: nn.Module, name: str, share: float = 0.4) -> BoolArray:
    return np.random.default_rng(3).random(sum(len(part) for layer in columns(model, name) for part in layer)) < share


def without(model: nn.Module, name: str, is_masked: BoolArray) -> nn.Module:
    """A copy of the model with columns set to zero."""
    other, start = copy.deepcopy(model), 0
    for layer in columns(other, name):
        for part in layer:
            part[torch.from_numpy(is_masked[start : start + len(part)])] = 0
            start += len(part)
    assert start == len(is_masked)
    return other


def logits(model: nn.Module, *, seed: int = 0) -> Tensor:
    ids = torch.randint(3, tiny.VOCAB, (3, 16), generator=torch.Generator().manual_seed(seed))
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    more = {"decoder_input_ids": ids[:, :9]} if is_encoder_decoder else {}
    with torch.no_grad():
        out: Any = model(ids, **more)
    return out if isinstance(out, Tensor) else out["logits"]


def logits_under(model: nn.Module, name: str, is_masked: BoolArray) -> Tensor:
    with masked_in(model, name, is_masked):
        return logits(model)


@contextmanager
def masked_in(model: nn.Module, name: str, is_masked: BoolArray) -> Iterator[None]:
    with masked(find_expert_layers(model, dense=name.startswith("dense")), is_masked, CPU):
        yield


@pytest.mark.parametrize("name", WEIGHTS)
def test_masked_neurons_are_columns_of_zeros(name: str) -> None:
    model = build(name)
    is_masked = some_neurons(model, name)
    other = without(model, name, is_masked)
    found = logits_under(model, name, is_masked)
    assert not torch.allclose(found, logits(model), atol=1e-3)
    torch.testing.assert_close(found, logits(other), atol=1e-5, rtol=1e-5)
    assert torch.equal(found, logits_under(other, name, np.zeros_like(is_masked)))  # by the same kernels


@pytest.mark.parametrize("name", WEIGHTS)
def test_masking_nothing_changes_nothing(name: str) -> None:
    model = build(name)
    nothing = np.zeros_like(some_neurons(model, name))
    assert torch.equal(logits_under(model, name, nothing), logits(model))


@pytest.mark.parametrize("name", [*TINY, "llama4", "plain shared_list"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "autocast"])
def test_in_16_bits(name: str, precision: str) -> None:
    model = build(name)
    if precision != "autocast":
        model = model.to(getattr(torch, precision))
    is_masked = some_neurons(model, name)
    nothing = np.zeros_like(is_masked)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        found = logits_under(model, name, is_masked)
        by_hand = logits_under(without(model, name, is_masked), name, nothing)
        unmasked = logits_under(model, name, nothing)
    assert torch.equal(found, by_hand)
    assert not torch.allclose(found, unmasked, atol=1e-2)


@pytest.mark.parametrize("name", ["olmoe", "qwen2_moe", "gpt_oss", "plain gpt2", "plain dense_all"])
def test_a_layer_without_any_neuron_puts_out_its_biases(name: str) -> None:
    model = build(name)
    prefix, numbers, _ = WEIGHTS[name]
    block = model.get_submodule(prefix.format(numbers[1]).rstrip("."))
    outputs: list[Tensor] = []
    weighted: list[Tensor] = []
    sizes = [sum(len(part) for part in layer) for layer in columns(model, name)]
    is_masked = np.repeat([number == 1 for number in range(len(sizes))], sizes)
    with (
        block.register_forward_hook(lambda module, args, out: outputs.append(out if name != "gpt_oss" else out[0])),
        masked_in(model, name, is_masked),
    ):
        if name == "gpt_oss":  # Σ routing weight · bias
            experts = block.experts
            run = experts.forward

            def weigh(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
                weighted.append(torch.einsum("tk,tkd->td", weight, experts.down_proj_bias[index]).detach())
                return run(x, index, weight)

            experts.forward = weigh
        logits(model)
    if name == "gpt_oss":
        torch.testing.assert_close(outputs[0].flatten(0, -2), weighted[0])
    elif name == "plain gpt2":  # each token has two experts, whose weights add up to 1
        biases = torch.stack([expert.c_proj.bias for expert in block.experts])
        out = outputs[0].flatten(0, -2)
        share = torch.linalg.lstsq(biases.T, out.T).solution
        torch.testing.assert_close(share.T @ biases, out, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(share.sum(0), torch.ones(len(out)), atol=1e-3, rtol=1e-3)
    else:
        assert not outputs[0].any()


def state(model: nn.Module) -> dict[str, Any]:
    """Whatever could be left behind."""
    hooks = [
        (name, kind, len(registered))
        for name, module in model.named_modules()
        for kind, registered in vars(module).items()
        if kind.endswith("_hooks")
    ]
    config = getattr(model, "config", None)
    return {
        "hooks": hooks,
        "versions": [parameter._version for parameter in model.parameters()],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "implementation": getattr(config, "_experts_implementation_internal", None),
        "modes": [module.training for module in model.modules()],
        "grad": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss", "dbrx", "llama4", "plain deepseek_v1", "dense llama"])
@pytest.mark.parametrize("fails", [None, "inside", "in a forward"])
def test_nothing_is_left_afterwards(name: str, fails: str | None) -> None:
    model = build(name)
    weights, before, expected = copy.deepcopy(model.state_dict()), state(model), logits(model)
    handles = []
    if fails == "in a forward":
        last = columns_owner(model, name)
        handles.append(last.register_forward_hook(fail))

    def run() -> None:
        with masked_in(model, name, some_neurons(model, name)):
            logits(model)
            if fails == "inside":
                raise RuntimeError("injected")

    if fails:
        with pytest.raises(RuntimeError, match="injected"):
            run()
    else:
        run()
    for handle in handles:
        handle.remove()
    assert state(model) == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(model), expected)


def columns_owner(model: nn.Module, name: str) -> nn.Module:
    """A module that runs in a forward of the last layer's experts."""
    prefix, numbers, weights = WEIGHTS[name]
    return model.get_submodule((prefix.format(numbers[-1]) + weights[-1][0]).rpartition(".")[0])


def fail(*args: Any) -> None:
    raise RuntimeError("injected")


class LoRA(nn.Module):
    """An adapter around a linear map, as PEFT puts it there."""

    def __init__(self, base: nn.Linear, rank: int = 3) -> None:
        super().__init__()
        self.in_features, self.out_features, self.base_layer = base.in_features, base.out_features, base
        self.a, self.b = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.b(self.a(x))


def test_neurons_write_nothing_through_an_adapter_either() -> None:
    torch.manual_seed(0)
    model = build("plain qwen2")
    mlps = [mlp for mlp in model.modules() if isinstance(mlp, GatedMLP)]
    for mlp in mlps:
        mlp.down_proj = LoRA(mlp.down_proj)
    is_masked = np.random.default_rng(0).random(layout_of(find_expert_layers(model)).n_neurons) < 0.4
    other, rest = copy.deepcopy(model), torch.from_numpy(is_masked)
    for layer in other.layers:
        for mlp in (*layer.mlp.experts, layer.mlp.shared_expert):
            own, rest = rest.tensor_split([mlp.down_proj.in_features])
            for weight in (mlp.down_proj.base_layer.weight, mlp.down_proj.a.weight):
                weight.detach()[:, own] = 0
    with masked_in(model, "", is_masked):
        assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("call", [lambda down, act: down(act), lambda down, act: down(input=act)])
def test_activations_come_by_position_or_by_name(call: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model = build("plain qwen2")
    is_masked = np.ones(layout_of(find_expert_layers(model)).n_neurons, dtype=np.bool_)
    for mlp in model.modules():
        if isinstance(mlp, GatedMLP):
            mlp.forward = lambda x, mlp=mlp: call(mlp.down_proj, F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    outputs: list[Tensor] = []
    with (
        model.layers[0].mlp.register_forward_hook(lambda module, args, out: outputs.append(out)),
        masked_in(model, "", is_masked),
    ):
        logits(model)
    assert not outputs[0].any()


@pytest.mark.parametrize("name", ["olmoe", "plain dense_all"])
def test_an_infinite_activation_is_masked_too(name: str) -> None:
    model, neuron = build(name), 5
    block = model.get_submodule(WEIGHTS[name][0].format(0).rstrip("."))
    gates = block.experts.gate_up_proj if name == "olmoe" else [expert.gate_proj.weight for expert in block.experts]
    for gate in gates:  # of every expert of the first layer
        gate.detach()[neuron] = float("inf")
    assert not logits(model).isfinite().all()
    is_masked = np.concatenate([np.arange(len(part)) == neuron for layer in columns(model, name) for part in layer])
    assert logits_under(model, name, is_masked).isfinite().all()


def test_experts_that_cannot_be_masked_are_named() -> None:
    model = build("plain qwen2")
    is_masked = np.ones(layout_of(find_expert_layers(model)).n_neurons, dtype=np.bool_)
    with masked_in(model, "", is_masked):
        pass  # nothing ran
    shared = model.layers[1].mlp.shared_expert
    shared.forward = partial(by_weight, shared)
    with (
        pytest.raises(ProbeError, match=r"^layers\.1\.mlp ran without calling layers\.1\.mlp\.shared_expert in a way"),
        masked_in(model, "", is_masked),
    ):
        logits(model)


def by_weight(mlp: GatedMLP, x: Tensor) -> Tensor:
    return F.linear(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight)


@pytest.mark.parametrize(
    ("is_masked", "got"),
    [(np.zeros(7, dtype=np.bool_), r"bool \[7\]"), (np.zeros(144, dtype=np.int64), r"int64 \[144\]")],
)
def test_there_is_one_flag_for_each_neuron(is_masked: BoolArray, got: str) -> None:
    with (
        pytest.raises(ValueError, match=rf"is_masked: expected bool \[144\], got {got}"),
        masked_in(build("olmoe"), "olmoe", is_masked),
    ):
        pass

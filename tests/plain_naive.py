"""The definitions as plain float64 loops, for the models of `plain_moe`.

Only the input and the output of each MoE block are taken from the model. Who is sent to which expert, with which
weight, and what each neuron does there is computed here once more, for each way to dispatch from what it is known
to do.
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from naive import NaiveLayer
from plain_moe import CAPACITY, CHOICES, FACTS, SCALING, Facts, K

Array = np.ndarray
Route = list[tuple[int, float]]
"""The experts of one token, with G."""


class Neurons(NamedTuple):
    """One expert at one token: its output is ``scale * (down @ act + bias)``."""

    act: Array
    down: Array
    """``[D, I]``"""
    bias: Array
    scale: Array
    """Of each channel; one, where no norm follows the down projection."""


def plain_scores(
    model: nn.Module, name: str, samples: list[tuple[list[int], list[bool]]]
) -> tuple[list[NaiveLayer], list[list[float]]]:
    """Contributions of every layer, and the log-likelihoods of the response tokens, one sample at a time.

    A neuron has an entry where its expert was chosen, and no other.
    """
    model = copy.deepcopy(model).double().eval()
    facts = FACTS[name]
    head = _array(model.lm_head.weight)
    blocks = {n: model.get_submodule(f"layers.{n}.{facts.block}") for n in facts.layers}
    seen: dict[int, tuple[Array, Array]] = {}
    for n, block in blocks.items():

        def read(module: nn.Module, args: tuple[Any, ...], out: Any, n: int = n) -> None:
            seen[n] = _array(args[0][0]), _array((out[0] if isinstance(out, tuple) else out)[0])

        block.register_forward_hook(read)

    layers = [NaiveLayer(n, facts.n_routed * facts.width + sum(facts.shared)) for n in blocks]
    log_likelihoods: list[list[float]] = []
    for ids, scored in samples:
        with torch.no_grad():
            out = model(torch.tensor([ids]))
        logits = (out["logits"] if isinstance(out, dict) else out)[0].log_softmax(-1)
        positions = [t for t in range(1, len(ids)) if scored[t]]
        log_likelihoods.append([float(logits[t - 1, ids[t]]) for t in positions])
        for layer in layers:
            block, (block_in, block_out) = blocks[layer.layer], seen[layer.layer]
            routes = _routes(name, block, block_in)
            scores: dict[tuple[int, str, int], float] = {}
            outputs: list[float] = []
            for order, t in enumerate(positions):
                y = head[ids[t]]
                total = float(block_out[t - 1] @ y)
                for names, weight, neurons, readout in _experts(name, facts, block, block_in[t - 1], routes[t - 1], y):
                    readout = neurons.scale * readout
                    for j, (expert, neuron) in enumerate(names):
                        scores[order, expert, neuron] = weight * neurons.act[j] * float(neurons.down[:, j] @ readout)
                    total -= weight * float(neurons.bias @ readout)
                outputs.append(total)
            layer.scores.append(scores)
            layer.moe_output.append(outputs)
    return layers, log_likelihoods


def _experts(
    name: str, facts: Facts, block: nn.Module, x: Array, route: Route, y: Array
) -> list[tuple[list[tuple[str, int]], float, Neurons, Array]]:
    """All experts that one token passes through, shared ones too.

    For each: the names of its neurons, G, what they do, and y as it is seen from the output of the expert.
    """
    modules = list(block.get_submodule(facts.experts).children())
    inner = _linear(block.into_latent, x) if name == "latent" else x
    found = []
    for e, weight in route:
        names = [(f"E{e:03d}", j) for j in range(facts.width)]
        if name == "input_weighted":
            found.append((names, 1.0, _neurons(modules[e], weight * inner), y))
        else:
            found.append((names, weight, _neurons(modules[e], inner), y))
    if name == "latent":
        routed = sum(weight * (neurons.down @ neurons.act) for _, weight, neurons, _ in found)
        out_of_latent = _array(block.out_of_latent.weight)
        seen = (_rms_scale(block.norm, out_of_latent @ routed) * y) @ out_of_latent
        found = [(names, weight, neurons, seen) for names, weight, neurons, _ in found]
    number = 0
    for module, weight in _shared(name, block, x):
        neurons = _neurons(module, x)
        flat = range(number, number + len(neurons.act))
        found.append(([(f"S{j // facts.width + 1:03d}", j % facts.width) for j in flat], weight, neurons, y))
        number += len(neurons.act)
    return found


def _shared(name: str, block: nn.Module, x: Array) -> list[tuple[nn.Module, float]]:
    if name == "qwen2":
        return [(block.shared_expert, _sigmoid(float(_linear(block.shared_expert_gate, x)[0])))]
    if name == "shared_list":
        return [(module, 1.0) for module in block.shared_experts]
    return [(block.shared_experts, 1.0)] if name in ("deepseek_v1", "deepseek_v2") else []


def _routes(name: str, block: nn.Module, x_TD: Array) -> list[Route]:
    """The experts of each token of one sequence."""
    if name == "expert_choice":
        return _experts_choose(_linear(block.gate, x_TD))
    if name == "moduledict":
        return _first_come(_linear(block.router, x_TD))
    if name == "shared_list":
        router = block.moe.router
        scores = [[_sigmoid(value) for value in row] for row in _linear(router, x_TD)]
        bias = _array(router.e_score_correction_bias)
        chosen = [_highest(np.array(row) + bias, K) for row in scores]
        return [_to_one([(e, row[e]) for e in experts]) for row, experts in zip(scores, chosen, strict=True)]
    logits = x_TD @ _array(block.router) if name == "sequential" else _linear(block.gate, x_TD)
    softmax = [_softmax(row) for row in logits]
    routes = [[(e, float(row[e])) for e in _highest(row, K)] for row in softmax]
    if name == "qwen2":
        return routes
    if name in ("deepseek_v1", "deepseek_v2"):
        factor = SCALING if name == "deepseek_v2" else 1.0
        return [[(e, factor * weight) for e, weight in route] for route in routes]
    return [_to_one(route) for route in routes]


def _experts_choose(logits_TE: Array) -> list[Route]:
    routes: list[Route] = [[] for _ in logits_TE]
    for e, column in enumerate(logits_TE.T):
        over_tokens = _softmax(column)
        for t in _highest(over_tokens, min(CHOICES, len(column))):
            routes[t].append((e, float(over_tokens[t])))
    return routes


def _first_come(logits_TE: Array) -> list[Route]:
    routes: list[Route] = []
    taken: dict[int, int] = {}
    for row in logits_TE:
        (e,) = _highest(row, 1)
        taken[e] = taken.get(e, 0) + 1
        routes.append([(e, float(_softmax(row)[e]))] if taken[e] <= CAPACITY else [])
    return routes


def _neurons(expert: nn.Module, x: Array) -> Neurons:
    """Whatever kind of expert it is, told by the names of what it holds."""
    parts = dict(expert.named_children())
    if "gate_proj" in parts or "w1" in parts:
        names = ("w1", "w3", "w2") if "w1" in parts else ("gate_proj", "up_proj", "down_proj")
        gate, up, down = (parts[name] for name in names)
        act = np.array([g * _sigmoid(g) * u for g, u in zip(_linear(gate, x), _linear(up, x), strict=True)])
    elif "c_fc" in parts:
        down = parts["c_proj"]
        hidden = x @ _array(parts["c_fc"].weight) + _array(parts["c_fc"].bias)
        root = math.sqrt(2 / math.pi)
        act = np.array([0.5 * h * (1 + math.tanh(root * (h + 0.044715 * h**3))) for h in hidden])
        bias = _array(down.bias)
        return Neurons(act, _array(down.weight).T, bias, np.ones_like(bias))
    elif "0" in parts:
        down = parts["2"]
        act = np.array([0.5 * h * (1 + math.erf(h / math.sqrt(2))) for h in _linear(parts["0"], x)])
    else:
        up, down = (parts[name] for name in (("wi", "wo") if "wi" in parts else ("fc_in", "fc_out")))
        act = np.array([max(h, 0.0) ** 2 for h in _linear(up, x)])
    weight = _array(down.weight)
    bias = np.zeros(len(weight)) if down.bias is None else _array(down.bias)
    scale = _rms_scale(parts["norm"], weight @ act) if "norm" in parts else np.ones(len(weight))
    return Neurons(act, weight, bias, scale)


def _array(x: Tensor) -> Array:
    return x.detach().numpy()


def _linear(module: nn.Module, x: Array) -> Array:
    out = x @ _array(module.weight).T
    return out if getattr(module, "bias", None) is None else out + _array(module.bias)


def _rms_scale(norm: nn.Module, x: Array) -> Array:
    """What the norm multiplies each channel of its present input by."""
    return _array(norm.weight) / math.sqrt(float(np.mean(x**2)) + 1e-6)


def _highest(values: Array, k: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])[:k]


def _to_one(route: Route) -> Route:
    total = sum(weight for _, weight in route)
    return [(e, weight / total) for e, weight in route]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _softmax(x: Array) -> Array:
    powers = np.exp(x - x.max())
    return powers / powers.sum()

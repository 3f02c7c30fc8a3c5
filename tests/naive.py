"""The definitions once more, as plain loops over tokens, experts and neurons in float64.

Written from the formulas, not from the code under test: it shares nothing with it but the model. What the experts
are given and how they are weighted is read from the eager model; everything after that is computed here.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

Neuron = tuple[int, str, int]  # layer, E3 or S1, neuron


@dataclass
class NaiveLayer:
    layer: int
    n_neurons: int
    scores: list[dict[tuple[int, str, int], float]] = field(default_factory=list)
    """For each sample: (response position, expert, neuron) → contribution."""
    moe_output: list[list[float]] = field(default_factory=list)
    """For each sample and response position: ⟨output of the layer, W_head[y]⟩, less what output biases add."""


def _silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def _routed_activation(experts: nn.Module, e: int, x: np.ndarray, family: str) -> tuple[np.ndarray, np.ndarray]:
    """(activations [I], columns of the down projection [D, I]) of one expert for one token."""
    w = experts.gate_up_proj[e].detach().numpy()
    down = experts.down_proj[e].detach().numpy()
    if family == "gpt_oss":
        both = x @ w + experts.gate_up_proj_bias[e].detach().numpy()
        gate, up = both[0::2], both[1::2]
        gate, up = np.minimum(gate, 7.0), np.clip(up, -7.0, 7.0)
        return np.array([(u + 1) * g / (1 + math.exp(-1.702 * g)) for g, u in zip(gate, up, strict=True)]), down.T
    both = w @ x
    half = len(both) // 2
    return np.array([_silu(both[j]) * both[half + j] for j in range(half)]), down


def naive_scores(
    model: PreTrainedModel, family: str, samples: list[tuple[list[int], list[bool]]]
) -> tuple[list[NaiveLayer], list[list[float]]]:
    """Contributions of every layer, and the log-likelihoods of the response tokens, one sample at a time."""
    model = copy.deepcopy(model).double().eval()
    model.set_experts_implementation("eager")
    head = model.get_output_embeddings().weight.detach().numpy()
    blocks = {name: m for name, m in model.named_modules() if hasattr(m, "experts")}
    seen: dict[str, dict[str, torch.Tensor]] = {name: {} for name in blocks}
    for name, block in blocks.items():

        def read_experts(module: nn.Module, args: tuple, kwargs: dict, name: str = name) -> None:
            values = list(args) + list(kwargs.values())
            seen[name].update(x=values[0], index=values[1], weight=values[2])

        def read_block(module: nn.Module, args: tuple, out: object, name: str = name) -> None:
            seen[name]["block_in"] = args[0].flatten(0, -2)
            first = out[0] if isinstance(out, tuple) else out
            seen[name]["block_out"] = first.flatten(0, -2)

        block.experts.register_forward_pre_hook(read_experts, with_kwargs=True)
        block.register_forward_hook(read_block)

    layers = []
    for name, block in blocks.items():
        shared = getattr(block, "shared_expert", None) or getattr(block, "shared_experts", None)
        e, d, i = block.experts.num_experts, *_dims(block.experts, family)
        n_shared = shared.down_proj.in_features if shared is not None else 0
        layers.append(NaiveLayer(int(name.split(".")[2]), e * i + n_shared))
        assert d == head.shape[1]

    log_likelihoods: list[list[float]] = []
    for ids, scored in samples:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        positions = [t for t in range(1, len(ids)) if scored[t]]
        log_likelihoods.append([float(logits[t - 1, ids[t]]) for t in positions])
        for layer, (name, block) in zip(layers, blocks.items(), strict=True):
            scores: dict[tuple[int, str, int], float] = {}
            outputs = []
            here = {key: value.detach().numpy() for key, value in seen[name].items()}
            for n, t in enumerate(positions):
                y = head[ids[t]]
                outputs.append(float(here["block_out"][t - 1] @ y))
                for k in range(here["index"].shape[1]):
                    e, g = int(here["index"][t - 1, k]), float(here["weight"][t - 1, k])
                    act, down = _routed_activation(block.experts, e, here["x"][t - 1], family)
                    for j in range(len(act)):
                        scores[n, f"E{e:03d}", j] = g * act[j] * float(down[:, j] @ y)
                    if family == "gpt_oss":
                        outputs[-1] -= g * float(block.experts.down_proj_bias[e].detach().numpy() @ y)
                shared = getattr(block, "shared_expert", None) or getattr(block, "shared_experts", None)
                if shared is not None:
                    x = here["block_in"][t - 1]
                    gate = shared.gate_proj.weight.detach().numpy() @ x
                    up = shared.up_proj.weight.detach().numpy() @ x
                    g = 1.0
                    if hasattr(block, "shared_expert_gate"):
                        g = 1 / (1 + math.exp(-float(block.shared_expert_gate.weight.detach().numpy()[0] @ x)))
                    width = _dims(block.experts, family)[1]
                    for j in range(len(gate)):
                        column = shared.down_proj.weight.detach().numpy()[:, j]
                        name_s = f"S{j // width + 1:03d}"
                        scores[n, name_s, j % width] = g * _silu(gate[j]) * up[j] * float(column @ y)
            layer.scores.append(scores)
            layer.moe_output.append(outputs)
    return layers, log_likelihoods


def _dims(experts: nn.Module, family: str) -> tuple[int, int]:
    down = experts.down_proj.shape
    return (down[2], down[1]) if family == "gpt_oss" else (down[1], down[2])


def naive_key_neurons(layers: list[NaiveLayer], top_fraction: float) -> list[set[Neuron]]:
    """For each sample the neurons of the k highest entries of every layer."""
    n_samples = len(layers[0].scores)
    found: list[set[Neuron]] = [set() for _ in range(n_samples)]
    for layer in layers:
        k = max(1, math.floor(top_fraction * layer.n_neurons))
        for sample, scores in enumerate(layer.scores):
            finite = [entry for entry in scores if math.isfinite(scores[entry])]
            for _, expert, neuron in sorted(finite, key=lambda entry: (-scores[entry], entry))[:k]:
                found[sample].add((layer.layer, f"{expert[0]}{int(expert[1:])}", neuron))
    return found

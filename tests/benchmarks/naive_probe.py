"""What a probe has to find, as loops over samples, tokens and experts, from the formulas alone.

Of the package, only the probe is used that they are compared with. The model runs its own eager experts; what they are
given and how they are weighted is read there. Activations are rounded as the model rounds them, everything after that
is in float64.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from mui_callback import MUIProbe, MUIReport, ProbeSet
from mui_callback.probe.samples import TokenSample

Neuron = tuple[int, str, int]
"""Layer, ``E3`` or ``S1``, neuron of this expert."""
_LIMIT, _ALPHA = 7.0, 1.702
"""Of GPT-OSS's gate."""


@dataclass(frozen=True)
class Expected:
    """What the loops found."""

    keys: list[set[Neuron]]
    """Key neurons of each sample."""
    loss: NDArray[np.float64]
    """Σ negative log-likelihood of each sample's scored tokens, nats ``[N]``."""
    mass: dict[str, float]
    """Σ|f| of each expert over all samples, by label such as ``L3-E5``."""


class _Layer:
    """Reads one MLP: what its experts, or its only down projection, are given in a forward."""

    def __init__(self, path: str, mlp: Any) -> None:
        self.number = int(path.split(".")[-2])
        self.experts = getattr(mlp, "experts", None)
        self.shared = getattr(mlp, "shared_expert", None) or getattr(mlp, "shared_experts", None)
        self.gate = getattr(mlp, "shared_expert_gate", None)
        self.down = mlp.down_proj if self.experts is None else getattr(self.shared, "down_proj", None)
        if self.experts is not None:
            self.experts.register_forward_pre_hook(self._see_routed, with_kwargs=True)
        if self.down is not None:
            self.down.register_forward_pre_hook(self._see_activations)
        if self.gate is not None:
            self.gate.register_forward_hook(self._see_gate)

    def _see_routed(self, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.x_TD, self.expert_TK, self.weight_TK = (*args, *options.values())[:3]

    def _see_activations(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.act_TS = args[0].flatten(0, -2)

    def _see_gate(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        self.gate_T = torch.sigmoid(out.flatten())

    @property
    def width(self) -> int:
        """Neurons of a routed expert, or of a dense layer."""
        if self.experts is None:
            return int(self.down.weight.shape[1])
        return int(self.experts.down_proj.shape[1 if self.experts.is_transposed else 2])

    @property
    def n_neurons(self) -> int:
        routed = 0 if self.experts is None else len(self.experts.down_proj) * self.width
        return routed + (0 if self.down is None else self.down.weight.shape[1])

    def contributions(self, position: int, readout_D: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Name of each expert that a position is given to, and f of its neurons, float64 ``[width]``."""
        if self.experts is not None:
            for expert, weight in zip(self.expert_TK[position].tolist(), self.weight_TK[position], strict=True):
                down = self.experts.down_proj[expert].double()
                projected = down @ readout_D if self.experts.is_transposed else readout_D @ down
                yield f"E{expert}", weight.double() * self._activations(position, expert).double() * projected
        if self.down is not None:
            weight = 1.0 if self.gate is None else self.gate_T[position].double()
            f_S = weight * self.act_TS[position].double() * (readout_D @ self.down.weight.double())
            names = "S{}" if self.experts is not None else "E0"
            for number, part in enumerate(f_S.split(self.width), start=1):
                yield names.format(number), part

    def _activations(self, position: int, expert: int) -> Tensor:
        x_D, weight = self.x_TD[position], self.experts.gate_up_proj[expert]
        if self.experts.is_transposed:
            both = x_D @ weight + self.experts.gate_up_proj_bias[expert]
            gate, up = both[0::2].clamp(max=_LIMIT), both[1::2].clamp(-_LIMIT, _LIMIT)
            return (up + 1) * (gate * torch.sigmoid(gate * _ALPHA))
        gate, up = linear(x_D, weight).chunk(2)
        return silu(gate) * up


def expect(model: Any, samples: Sequence[TokenSample], top_fraction: float, *, dense: bool) -> Expected:
    """Run samples of one length through the model in one batch, and loop. The model is used up: hooks stay on it."""
    if not dense:
        model.set_experts_implementation("eager")
    mlps = [(path, module) for path, module in model.named_modules() if path.endswith(".mlp")]
    layers = [_Layer(path, mlp) for path, mlp in mlps if dense or hasattr(mlp, "experts")]
    head = model.get_output_embeddings().weight
    input_ids = torch.from_numpy(np.stack([sample.input_ids for sample in samples])).to(head.device)
    with torch.no_grad():
        log_p = model(input_ids=input_ids).logits.double().log_softmax(-1)
        keys: list[set[Neuron]] = []
        losses, mass = np.zeros(len(samples)), defaultdict[str, float](float)
        for row, sample in enumerate(samples):
            scored = np.flatnonzero(sample.scored).tolist()
            targets = sample.input_ids[scored].tolist()
            losses[row] = -sum(float(log_p[row, t - 1, y]) for t, y in zip(scored, targets, strict=True))
            positions = [row * len(sample.input_ids) + t - 1 for t in scored]
            readouts = [head[y].double() for y in targets]
            keys.append(set())
            for layer in layers:
                found = [f for at, y_D in zip(positions, readouts, strict=True) for f in layer.contributions(at, y_D)]
                keys[-1] |= _keys(layer, found, top_fraction)
                for name, f_I in found:
                    mass[f"L{layer.number}-{name}"] += float(f_I.abs().sum())
    return Expected(keys, losses, mass)


def _keys(layer: _Layer, found: Sequence[tuple[str, Tensor]], top_fraction: float) -> set[Neuron]:
    """The neurons of the highest entries of one sample in one layer."""
    k = max(1, math.floor(top_fraction * layer.n_neurons))
    entries = torch.cat([f_I for _, f_I in found])
    ends = np.cumsum([len(f_I) for _, f_I in found])
    neurons = set()
    for entry in entries.topk(k).indices.tolist():
        part = int(np.searchsorted(ends, entry, side="right"))
        neurons.add((layer.number, found[part][0], int(entry - ends[part] + len(found[part][1]))))
    return neurons


# Against a probe


def compare(report: MUIReport, expected: Expected) -> dict[str, float]:
    """How far a report is from what the loops found."""
    layout, counts = report.layout, report.counts
    own = [
        {tuple(layout.name_neuron(int(neuron))) for neuron in row.nonzero()[0]}
        for row in report.key_neuron_sets().toarray()
    ]
    both = sum(len(a & b) for a, b in zip(own, expected.keys, strict=True))
    either = sum(len(a | b) for a, b in zip(own, expected.keys, strict=True))
    mass = np.array([expected.mass.get(label, 0.0) for label in layout.expert_labels])
    return {
        "jaccard": both / either,
        "key_neurons": sum(map(len, own)),
        "loss_error": float(np.abs(counts.loss - expected.loss).max() / np.abs(expected.loss).max()),
        "mass_error": float(np.abs(counts.mass.sum(0) - mass).sum() / mass.sum()),  # in 16 bits, routers waver
        "identity_error": report.identity_error or 0.0,
    }


def check(model: Any, samples: Sequence[TokenSample], top_fraction: float, *, dense: bool) -> dict[str, Any]:
    """Probe a small model, and say whether loops find the same: in float32 exactly, in 16 bits but for rounding."""
    report = MUIProbe(
        model, ProbeSet({"all": list(samples)}), rules=f"top_fraction={top_fraction}", dense=dense
    ).measure()
    found = compare(report, expect(model, samples, top_fraction, dense=dense))
    is_exact = next(model.parameters()).dtype == torch.float32
    least, most, identity = (1.0, 1e-4, 1e-3) if is_exact else (0.97, 2e-2, 2e-2)
    agrees = found["jaccard"] >= least and max(found["loss_error"], found["mass_error"]) < most
    return {**found, "agrees": agrees and found["identity_error"] < identity}

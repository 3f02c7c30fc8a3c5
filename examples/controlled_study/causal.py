"""The causal check: what a trained model loses without some of its neurons.

What is masked is named by the samples of a report, and tested with those of a probe, which are others.

Shapes: E experts of all layers, N samples of a task.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mui_callback import MUIProbe, MUIReport
from mui_callback.metrics.random_control import neurons_of_experts
from mui_callback.metrics.utilization import BoolArray, FloatArray
from mui_callback.probe.losses import Trial
from mui_callback.task_report import TaskReport


def without_key_ones(probe: MUIProbe, report: MUIReport, draws: int) -> Iterator[dict[str, Any]]:
    """Without key neurons, or key experts, and without random ones."""
    for what in ("neurons", "experts"):
        for task, one in probe.ablate(report, what=what, draws=draws).tasks.items():
            if one.changes is None:  # no key expert
                continue
            for masked in ("key", "random"):
                yield {
                    "task": task,
                    "what": what,
                    "masked": masked,
                    "n_masked": one.n_masked,
                    "n_overlap": sum(one.n_overlap) / draws if masked == "random" else None,
                    "loss": one.changes.loss,
                    "change": getattr(one.changes, masked).value,
                }


def without_one_a_layer(probe: MUIProbe, report: MUIReport, draws: int) -> Iterator[dict[str, Any]]:
    """Without one expert of each layer: which one is missed most?"""
    table = probe.sample_table
    for index, task in enumerate(report.task_names):
        masks = _one_a_layer(report.tasks[task], np.random.default_rng(index), draws)
        sample = np.flatnonzero(table.task == index)
        trials = [Trial(sample, neurons_of_experts(report.layout, is_in_E)) for _, is_in_E in masks]
        losses = [float(loss_N.sum()) / int(table.n_tokens[sample].sum()) for loss_N in probe.losses(trials)]
        for masked in dict.fromkeys(name for name, _ in masks if name != "nothing"):
            changes = [loss - losses[0] for (name, _), loss in zip(masks, losses, strict=True) if name == masked]
            yield {
                "task": task,
                "what": "one expert a layer",
                "masked": masked,
                "n_masked": int(trials[1].is_masked.sum()),
                "n_overlap": None,
                "loss": losses[0],
                "change": sum(changes) / len(changes),
            }


def _one_a_layer(seen: TaskReport, rng: np.random.Generator, draws: int) -> list[tuple[str, BoolArray]]:
    """By name, which experts of all layers; first, none."""
    layout, n_layers = seen.layout, len(seen.layout.layers)
    layer_E, is_routed_E = layout.layer_of_expert, ~layout.is_shared

    def highest(value_E: FloatArray) -> BoolArray:
        """Of the routed experts of each layer."""
        is_in_E = np.zeros(layout.n_experts, dtype=np.bool_)
        for layer in range(n_layers):
            is_in_E[np.argmax(np.where(is_routed_E & (layer_E == layer), value_E, -1))] = True
        return is_in_E

    return [
        ("nothing", np.zeros(layout.n_experts, dtype=np.bool_)),
        # among experts that are activated as often, that with more key neurons
        ("most activated", highest(seen.activated_frequency + 1e-6 * seen.expert_mui)),
        ("most routed to", highest(seen.routed.astype(np.float64))),
        *(("random", highest(rng.random(layout.n_experts))) for _ in range(draws)),
        *([("shared", layout.is_shared)] if layout.is_shared.any() else []),
    ]

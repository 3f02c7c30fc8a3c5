"""Key neurons under every threshold rule, by sorting all entries of a sample in plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from naive import NaiveLayer, Neuron

Entry = TypeVar("Entry", bound=tuple)
"""Whatever orders equal scores: position, expert, neuron."""


def naive_entries(
    rule: str, layers: Sequence[Sequence[tuple[float, Entry]]], n_neurons: Sequence[int]
) -> list[tuple[int, Entry]]:
    """The entries of one sample that a rule takes, each with the position of its layer.

    Args:
        rule: as text.
        layers: the score of each entry of each layer; those that are not finite do not count.
        n_neurons: of each layer.
    """
    kind, value = rule.split("=")
    finite = [[(score, entry) for score, entry in layer if math.isfinite(score)] for layer in layers]
    ranked = [sorted(layer, key=lambda pair: (-pair[0], pair[1])) for layer in finite]
    if kind == "global_topk":
        everything = [(-score, number, entry) for number, layer in enumerate(ranked) for score, entry in layer]
        return [(number, entry) for _, number, entry in sorted(everything)[: int(value)]]
    taken = []
    for number, layer in enumerate(ranked):
        if kind == "top_fraction":
            layer = layer[: max(1, math.floor(float(value) * n_neurons[number] + 1e-9))]
        else:
            layer = [pair for pair in layer if pair[0] >= float(value) * layer[0][0]]
        taken += [(number, entry) for _, entry in layer]
    return taken


def naive_sets(layers: list[NaiveLayer], rule: str) -> list[set[Neuron]]:
    """The key neurons of each sample of a model."""
    found = []
    for number in range(len(layers[0].scores)):
        entries = [[(score, entry) for entry, score in layer.scores[number].items()] for layer in layers]
        taken = naive_entries(rule, entries, [layer.n_neurons for layer in layers])
        found.append({(layers[at].layer, f"{expert[0]}{int(expert[1:])}", neuron) for at, (_, expert, neuron) in taken})
    return found

"""How the neurons of a model's expert layers are numbered: plain data, no modules.

Every result of a probe is an array over one of three axes, and this file defines all three:

- *layers*: the MoE layers in the order of the model;
- *experts*: for each layer its routed experts ``E0, E1, …`` and then its shared experts ``S1, S2, …``;
- *neurons*: for each expert its intermediate units ``0 … width - 1``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

ExpertKind = Literal["routed", "shared", "dense"]


class KeyNeuron(NamedTuple):
    """One neuron of the model, by name.

    ``layer`` is the number in the module path (``model.layers.7.mlp`` is 7), ``expert`` is ``"E8"`` for the
    routed expert with index 8 or ``"S1"`` for the first shared expert, ``neuron`` is the index inside the expert.
    """

    layer: int
    expert: str
    neuron: int


@dataclass(frozen=True)
class LayerShape:
    """The experts of one MoE layer.

    A fused shared MLP whose width is a multiple of the routed width is listed as that many shared experts.
    """

    layer: int
    """Number of the layer in the module path."""
    path: str
    """Module path of the block that holds the experts."""
    n_routed: int
    """Routed experts, |E_r|."""
    routed_width: int
    """Neurons of each routed expert, I."""
    shared_widths: tuple[int, ...] = ()
    """Neurons of each shared expert; its length is |E_s|."""

    @property
    def n_experts(self) -> int:
        """Routed and shared experts, |E_r| + |E_s|."""
        return self.n_routed + len(self.shared_widths)

    @property
    def expert_kinds(self) -> tuple[ExpertKind, ...]:
        """What each expert is, in the order of the experts axis; a layer that is one expert is a dense one."""
        if self.n_experts == 1:
            return ("dense",)
        kinds: list[ExpertKind] = ["routed"] * self.n_routed
        kinds += ["shared"] * len(self.shared_widths)
        return tuple(kinds)

    @property
    def n_neurons(self) -> int:
        """Neurons of all experts of the layer."""
        return self.n_routed * self.routed_width + sum(self.shared_widths)

    @property
    def widths(self) -> tuple[int, ...]:
        """Neurons of each expert, in the order of the experts axis."""
        return (self.routed_width,) * self.n_routed + self.shared_widths

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LayerShape:
        """From the JSON form of ``dataclasses.asdict``."""
        return cls(**{**values, "shared_widths": tuple(values["shared_widths"])})


class ExpertLayout:
    """The layers, experts and neurons of a model, each numbered once through all layers."""

    def __init__(self, layers: Sequence[LayerShape]) -> None:
        self.layers: tuple[LayerShape, ...] = tuple(layers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ExpertLayout) and self.layers == other.layers

    def __hash__(self) -> int:
        return hash(self.layers)

    def __repr__(self) -> str:
        return f"ExpertLayout({len(self.layers)} layers, {self.n_experts} experts, {self.n_neurons} neurons)"

    @property
    def n_experts(self) -> int:
        """Experts of all layers."""
        return len(self.width)

    @property
    def n_neurons(self) -> int:
        """Neurons of all layers."""
        return int(self.width.sum())

    @cached_property
    def width(self) -> NDArray[np.int64]:
        """Neurons of each expert, int64 ``[experts]``."""
        return np.array([width for layer in self.layers for width in layer.widths], dtype=np.int64)

    @cached_property
    def layer_of_expert(self) -> NDArray[np.int64]:
        """Position in `layers` of each expert's layer, int64 ``[experts]``."""
        return np.repeat(np.arange(len(self.layers)), [layer.n_experts for layer in self.layers])

    @cached_property
    def is_shared(self) -> NDArray[np.bool_]:
        """Whether each expert is a shared one, bool ``[experts]``."""
        kinds = [[False] * layer.n_routed + [True] * len(layer.shared_widths) for layer in self.layers]
        return np.array([kind for layer in kinds for kind in layer], dtype=np.bool_)

    @cached_property
    def expert_kinds(self) -> tuple[ExpertKind, ...]:
        """What each expert is."""
        return tuple(kind for layer in self.layers for kind in layer.expert_kinds)

    @cached_property
    def first_neuron(self) -> NDArray[np.int64]:
        """Number of each expert's first neuron on the neurons axis of all layers, int64 ``[experts]``."""
        return np.concatenate([[0], np.cumsum(self.width)[:-1]]).astype(np.int64)

    @cached_property
    def expert_names(self) -> tuple[str, ...]:
        """``E0, E1, …, S1, …`` for each expert, without its layer."""
        return tuple(
            f"E{index}" if index < layer.n_routed else f"S{index - layer.n_routed + 1}"
            for layer in self.layers
            for index in range(layer.n_experts)
        )

    @cached_property
    def expert_labels(self) -> tuple[str, ...]:
        """``L17-E8`` or ``L28-S1`` for each expert, as in the tables of arXiv 2509.23933."""
        return tuple(
            f"L{self.layers[layer].layer}-{name}"
            for layer, name in zip(self.layer_of_expert, self.expert_names, strict=True)
        )

    def name_neuron(self, neuron: int) -> KeyNeuron:
        """The name of the neuron with this number on the neurons axis of all layers."""
        expert = int(np.searchsorted(self.first_neuron, neuron, side="right")) - 1
        layer = self.layers[self.layer_of_expert[expert]]
        return KeyNeuron(layer.layer, self.expert_names[expert], int(neuron - self.first_neuron[expert]))

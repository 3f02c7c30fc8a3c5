"""Every metric of one task, or of several pooled, of the whole model or of each layer, from counts alone.

Shapes: L MoE layers, E experts of all layers (routed and shared, see `ExpertLayout`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from mui_callback.layout import ExpertLayout
from mui_callback.metrics import concentration, performance, routing, utilization
from mui_callback.metrics.performance import PredictionSums
from mui_callback.metrics.utilization import BoolArray, FloatArray, IntArray, ratio


@dataclass(frozen=True, eq=False, repr=False)
class TaskReport:
    """The counts of one task, or of several pooled, and every metric that follows from them.

    A metric that has no answer (no shared experts, no choices, no sample) is None.
    """

    layout: ExpertLayout
    n_samples: int
    key_neurons: IntArray
    """Key neurons in each expert, \\|U ∩ expert\\|, ``[E]``."""
    activated: IntArray
    """Samples in which each expert owns a key neuron, ``[E]``."""
    mass: FloatArray
    """Σ\\|f\\| of each expert, ``[E]``."""
    routed: IntArray
    """Response tokens sent to each expert, ``[E]``."""
    predictions: PredictionSums
    key_expert_frequency: float
    """η_expert."""

    def __repr__(self) -> str:
        return f"TaskReport({self.n_samples} samples in {self.layout!r}, mui={self.mui}, loss={self.loss})"

    @property
    def layers(self) -> tuple[TaskReport, ...]:
        """The same counts restricted to one layer at a time; predictions stay those of the whole model."""
        return tuple(self._restricted_to(position) for position in range(len(self.layout.layers)))

    def _restricted_to(self, position: int) -> TaskReport:
        here = self.layout.layer_of_expert == position
        return replace(
            self,
            layout=ExpertLayout([self.layout.layers[position]]),
            key_neurons=self.key_neurons[here],
            activated=self.activated[here],
            mass=self.mass[here],
            routed=self.routed[here],
        )

    # Predictions

    @property
    def loss(self) -> float | None:
        """Nats per response token."""
        return ratio(self.predictions.loss, self.predictions.n_tokens)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per UTF-8 byte, over the samples whose bytes are known."""
        return performance.bits_per_byte(self.predictions.loss_of_bytes, self.predictions.n_bytes)

    @property
    def token_accuracy(self) -> float | None:
        """Share of response tokens that are the model's first choice."""
        return ratio(self.predictions.n_correct, self.predictions.n_tokens)

    @property
    def choice_accuracy(self) -> float | None:
        """Share of the samples with choices that are answered right."""
        return ratio(self.predictions.n_right, self.predictions.n_with_choices)

    # Utilization

    @property
    def is_measured(self) -> bool:
        """Whether any contribution was finite: there are samples with response tokens, which reach the experts."""
        return bool(self.key_neurons.any() or self.mass.sum() > 0)

    @property
    def mui(self) -> float | None:
        """Model Utilization Index, in [0, 1]."""
        return utilization.mui(self.key_neurons, self.layout.width) if self.is_measured else None

    @property
    def layer_mui(self) -> tuple[float | None, ...]:
        """MUI inside each layer, ``[L]``; None for a layer that no token reaches."""
        return tuple(layer.mui for layer in self.layers)

    @property
    def expert_mui(self) -> FloatArray:
        """Share of each expert's own neurons that are key neurons, ``[E]``."""
        return utilization.expert_mui(self.key_neurons, self.layout.width)

    @property
    def activated_frequency(self) -> FloatArray:
        """Share of the samples in which each expert owns a key neuron, ``[E]``."""
        return utilization.activated_frequency(self.activated, self.n_samples)

    @property
    def key_experts(self) -> BoolArray:
        """Whether each expert is a key expert, ``[E]``."""
        return utilization.key_experts(self.activated_frequency, self.key_expert_frequency)

    @property
    def key_expert_proportion(self) -> float | None:
        """Share of the experts that are key experts."""
        return ratio(int(self.key_experts.sum()), self.layout.n_experts) if self.is_measured else None

    @property
    def key_expert_mui(self) -> float | None:
        """Mean expert MUI of the key experts."""
        return utilization.key_expert_mui(self.expert_mui, self.key_experts)

    def top_experts(self, n: int = 10) -> list[tuple[str, float, float]]:
        """(label such as ``L17-E8``, activated frequency, expert MUI) of the n most frequently activated experts."""
        frequency, mui = self.activated_frequency, self.expert_mui
        chosen = utilization.top_experts(frequency, mui, n)
        return [(self.layout.expert_labels[i], float(frequency[i]), float(mui[i])) for i in chosen]

    # Shared experts

    @property
    def shared_share(self) -> float | None:
        """Share of the key neurons that are in shared experts."""
        return self._shared_part(self.key_neurons)

    @property
    def shared_mass_share(self) -> float | None:
        """Share of the contribution mass that is made by shared experts."""
        return self._shared_part(self.mass)

    @property
    def shared_in_top10(self) -> int | None:
        """Shared experts among the ten with the highest activated frequency."""
        if not self.layout.is_shared.any() or not self.key_neurons.any():
            return None
        top = utilization.top_experts(self.activated_frequency, self.expert_mui)
        return int(self.layout.is_shared[top].sum())

    @property
    def shared_fair_ratio(self) -> float | None:
        """`shared_share` over the share of neurons that shared experts have."""
        share, fair = self.shared_share, self._shared_part(self.layout.width)
        return None if share is None or fair is None else ratio(share, fair)

    def _shared_part(self, amount: IntArray | FloatArray) -> float | None:
        shared = self.layout.is_shared
        return ratio(float(amount[shared].sum()), float(amount.sum())) if shared.any() else None

    # Concentration over all experts of all layers

    @property
    def expert_gini(self) -> float | None:
        """Gini coefficient of key neurons over experts."""
        return concentration.gini(self.key_neurons)

    @property
    def expert_entropy(self) -> float | None:
        """Normalised entropy of key neurons over experts."""
        return concentration.normalized_entropy(self.key_neurons)

    @property
    def expert_diversity(self) -> float | None:
        """Effective experts of key neurons over the number of experts."""
        return concentration.expert_diversity(self.key_neurons)

    @property
    def effective_experts(self) -> float | None:
        """Effective number of experts of key neurons."""
        return concentration.effective_experts(self.key_neurons)

    @property
    def top10_share(self) -> float | None:
        """Share of the key neurons in the ten experts with most."""
        return concentration.top_share(self.key_neurons)

    @property
    def mass_gini(self) -> float | None:
        """Gini coefficient of contribution mass over experts."""
        return concentration.gini(self.mass)

    @property
    def mass_entropy(self) -> float | None:
        """Normalised entropy of contribution mass over experts."""
        return concentration.normalized_entropy(self.mass)

    @property
    def mass_diversity(self) -> float | None:
        """Effective experts of contribution mass over the number of experts."""
        return concentration.expert_diversity(self.mass)

    @property
    def mass_effective_experts(self) -> float | None:
        """Effective number of experts of contribution mass."""
        return concentration.effective_experts(self.mass)

    @property
    def mass_top10_share(self) -> float | None:
        """Share of the contribution mass made by the ten experts with most."""
        return concentration.top_share(self.mass)

    # Routing: to routed experts

    @property
    def dead_experts(self) -> float | None:
        """Share of the routed experts that no response token was sent to."""
        routed = self.routed[~self.layout.is_shared]
        return ratio(int((routed == 0).sum()), len(routed)) if self.predictions.n_tokens else None

    @property
    def load_max_ratio(self) -> float | None:
        """Tokens of the busiest expert of a layer over the mean of its experts; mean over layers, as the next two."""
        return self._mean_over_layers(routing.load_max_ratio)

    @property
    def load_variation(self) -> float | None:
        """Coefficient of variation of the tokens of a layer's experts."""
        return self._mean_over_layers(routing.load_variation)

    @property
    def router_entropy(self) -> float | None:
        """Normalised entropy of where the router of a layer sends the response tokens."""
        return self._mean_over_layers(routing.router_entropy)

    @property
    def routing_rank_correlation(self) -> float | None:
        """Spearman's rank correlation, over the routed experts of all layers, between the tokens that are sent to an
        expert and the samples in which it owns a key neuron."""
        is_routed = ~self.layout.is_shared
        return routing.rank_correlation(self.routed[is_routed], self.activated[is_routed])

    def _mean_over_layers(self, metric: Callable[[IntArray], float | None]) -> float | None:
        """Of the layers that have an answer."""
        layer_E, is_routed_E = self.layout.layer_of_expert, ~self.layout.is_shared
        values = [metric(self.routed[is_routed_E & (layer_E == layer)]) for layer in range(len(self.layout.layers))]
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None

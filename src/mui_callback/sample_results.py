"""What a pass found of single samples, and the estimates with error bars that follow from it.

Shapes: N samples, J neurons of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Literal, get_args

import numpy as np
from scipy.sparse import csr_array

from mui_callback.counts import ProbeCounts
from mui_callback.layout import ExpertLayout
from mui_callback.metrics.key_sets import OwnedCounts
from mui_callback.metrics.performance import PredictionSums, choice_is_right
from mui_callback.metrics.resampling import Estimate, ratio_of_sums, union_size
from mui_callback.metrics.utilization import BoolArray, FloatArray, IntArray
from mui_callback.sample_table import SampleTable

EstimatedMetric = Literal[
    "mui", "loss", "bits_per_byte", "token_accuracy", "choice_accuracy", "shared_share", "shared_mass_share"
]
ESTIMATED: tuple[EstimatedMetric, ...] = get_args(EstimatedMetric)
"""The metrics that have error bars."""
_Amounts = FloatArray | IntArray | BoolArray


@dataclass(frozen=True, eq=False)
class SampleResults:
    """One amount for each sample, ``[N]``."""

    n_tokens: IntArray
    """Response tokens."""
    n_bytes: IntArray
    """UTF-8 bytes of the response, -1 where they are not known."""
    loss: FloatArray
    """Σ negative log-likelihood of the response tokens, nats."""
    n_correct: IntArray
    """Response tokens that are the model's first choice."""
    has_choices: BoolArray
    is_right: BoolArray
    """Whether the best choice is the answer; False without choices."""
    n_key_neurons: IntArray
    n_shared_key_neurons: IntArray
    """Those of them that are in shared experts."""
    n_key_experts: IntArray
    """Experts that own a key neuron of the sample."""
    routed_mass: FloatArray
    """Σ\\|f\\| of routed experts."""
    shared_mass: FloatArray
    """Σ\\|f\\| of shared experts."""

    @classmethod
    def from_counts(cls, table: SampleTable, counts: ProbeCounts, owned: OwnedCounts) -> SampleResults:
        """Of all samples of a pass."""
        has_choices, is_right = choice_is_right(
            counts.choice_loss, table.choice_length, table.choice_sample, table.answer
        )
        return cls(
            n_tokens=table.n_tokens,
            n_bytes=table.n_bytes,
            loss=counts.loss,
            n_correct=counts.correct,
            has_choices=has_choices,
            is_right=is_right,
            n_key_neurons=owned.n_neurons_N,
            n_shared_key_neurons=owned.n_shared_N,
            n_key_experts=owned.n_experts_N,
            routed_mass=counts.sample_mass[:, 0],
            shared_mass=counts.sample_mass[:, 1],
        )

    def of(self, is_in_N: BoolArray) -> SampleResults:
        """Of some of the samples, in their order."""
        return SampleResults(*(getattr(self, field.name)[is_in_N] for field in fields(self)))

    @property
    def prediction_sums(self) -> PredictionSums:
        """Sums over the samples."""
        has_bytes = self.n_bytes >= 0
        return PredictionSums(
            loss=float(self.loss.sum()),
            n_tokens=int(self.n_tokens.sum()),
            n_correct=int(self.n_correct.sum()),
            loss_of_bytes=float(self.loss[has_bytes].sum()),
            n_bytes=int(self.n_bytes[has_bytes].sum()),
            n_with_choices=int(self.has_choices.sum()),
            n_right=int(self.is_right.sum()),
        )


@dataclass(frozen=True, eq=False)
class TaskEstimates:
    """The metrics of one task, or of several pooled, as estimates from its samples.

    Their values are those of the `TaskReport`. What a metric adds up over samples is a ratio of sums; a union is not,
    see `mui_callback.metrics.resampling`.
    """

    layout: ExpertLayout
    results: SampleResults
    sets: csr_array
    """Key neurons of each sample, ``[N, J]``."""

    def estimate(self, metric: EstimatedMetric) -> Estimate | None:
        """None where the metric has no answer.

        Raises:
            KeyError: the metric has no error bars.
        """
        if metric not in self._known:
            raise KeyError(f"no error bars for {metric!r}; the metrics that have them are {', '.join(ESTIMATED)}")
        return self._known[metric]()

    @property
    def _known(self) -> Mapping[str, Callable[[], Estimate | None]]:
        one, has_bytes = self.results, self.results.n_bytes >= 0
        bits, n_bytes = (np.where(has_bytes, amount, 0) for amount in (one.loss / np.log(2), one.n_bytes))
        return {
            "mui": self._mui,
            "loss": lambda: _over(one.loss, one.n_tokens),
            "bits_per_byte": lambda: _over(bits, n_bytes),
            "token_accuracy": lambda: _over(one.n_correct, one.n_tokens),
            "choice_accuracy": lambda: _over(one.is_right, one.has_choices),
            "shared_share": self._shared_share,
            "shared_mass_share": self._shared_mass_share,
        }

    def _mui(self) -> Estimate | None:
        union = union_size(self.sets)
        is_measured = self.sets.nnz > 0 or (self.results.routed_mass + self.results.shared_mass).sum() > 0
        return union.over(self.layout.n_neurons) if union is not None and is_measured else None

    def _shared_share(self) -> Estimate | None:
        if not self.layout.is_shared.any():
            return None
        union, shared = (
            union_size(self.sets),
            union_size(self.sets, np.repeat(self.layout.is_shared, self.layout.width)),
        )
        return None if union is None or shared is None else shared.over(union)

    def _shared_mass_share(self) -> Estimate | None:
        if not self.layout.is_shared.any():
            return None
        return _over(self.results.shared_mass, self.results.routed_mass + self.results.shared_mass)


def _over(numerator_N: _Amounts, denominator_N: _Amounts) -> Estimate | None:
    return ratio_of_sums(numerator_N.astype(np.float64), denominator_N.astype(np.float64))

"""The result of one probe pass, kept as counts from which every metric follows.

Shapes: E experts and J neurons of all layers (see `ExpertLayout`), N samples.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import csr_array

from mui_callback.counts import KeySets
from mui_callback.layout import KeyNeuron
from mui_callback.metrics import key_sets
from mui_callback.metrics.catalogue import CATALOGUE, Detail, Scope, key, layer_keys, metric_named, rule_key
from mui_callback.metrics.resampling import Estimate, Interval, bootstrap_intervals
from mui_callback.metrics.utilization import BoolArray
from mui_callback.pass_results import PassResults
from mui_callback.rules import Rule
from mui_callback.sample_results import ESTIMATED, EstimatedMetric, SampleResults, TaskEstimates
from mui_callback.samples_table import samples_table, write_parquet
from mui_callback.task_report import TaskReport

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True, eq=False, repr=False)
class MUIReport(PassResults):
    """What one probe pass found.

    Metrics of all tasks pooled are on `pooled`, those of one task on ``tasks[name]``; both are a `TaskReport`. They are
    those of the first of the rules that say what a key neuron is; see `under` for the others.
    """

    def __repr__(self) -> str:
        mui, loss = (f"{value:.4g}" if value is not None else "None" for value in (self.pooled.mui, self.pooled.loss))
        return f"MUIReport({', '.join(self.task_names)}: {self.n_samples} samples, mui={mui}, loss={loss})"

    @cached_property
    def tasks(self) -> Mapping[str, TaskReport]:
        """The report of each task."""
        return {name: self._task_report([index]) for index, name in enumerate(self.task_names)}

    @cached_property
    def pooled(self) -> TaskReport:
        """All tasks together: the union of their key neurons, the sum of their counts."""
        return self._task_report(list(range(len(self.task_names))))

    def under(self, rule: str) -> MUIReport:
        """The report of the same pass in which another of its rules says what a key neuron is.

        Raises:
            KeyError: the pass did not count under this rule.
            ValueError: it is none.
        """
        first = self._number_of(rule)
        order = [first, *(number for number in range(len(self.rules)) if number != first)]
        return replace(
            self,
            settings=replace(self.settings, rules=tuple(self.rules[number] for number in order)),
            counts=replace(self.counts, key_sets=tuple(self.counts.key_sets[number] for number in order)),
        )

    @property
    def mui(self) -> float | None:
        """Model Utilization Index of all tasks pooled, in [0, 1]."""
        return self.pooled.mui

    def scalars(self, *, detail: Detail = "model") -> dict[str, float]:
        """Everything that is logged: ``mui/<metric>`` pooled and ``mui/<task>/<metric>``.

        Keys and definitions are those of `mui_callback.metrics.catalogue`. A metric that has no answer is left out,
        so no value is None, NaN or infinite.

        Args:
            detail: ``"layers"`` for ``mui/layer_<metric>/<layer>`` besides, at most 256 keys.
        """
        values: dict[str, float | None] = {}
        for metric in CATALOGUE:
            if metric.scope is Scope.PROBE:
                values[key(metric.name)] = getattr(self, metric.attribute or metric.name)
        for task, scopes in ((None, (Scope.TASK, Scope.POOLED)), *((name, (Scope.TASK,)) for name in self.task_names)):
            found, ends = (self.pooled, self._interval_ends()) if task is None else (self.tasks[task], {})
            for metric in CATALOGUE:
                if metric.scope in scopes:
                    name = metric.name
                    values[key(name, task)] = ends[name] if name in ends else getattr(found, name)
        values |= {rule_key(rule): self.under(rule).mui for rule in self.rules[1:]}
        if detail == "layers":
            values |= self._of_layers()
        return {name: float(value) for name, value in values.items() if value is not None and np.isfinite(value)}

    def _of_layers(self) -> dict[str, float | None]:
        layers, numbers = self.pooled.layers, [layer.layer for layer in self.layout.layers]
        return {
            name: getattr(layers[position], metric.attribute)
            for metric in CATALOGUE
            if metric.scope is Scope.LAYER
            for position, name in layer_keys(metric.name, numbers).items()
        }

    def _interval_ends(self) -> dict[str, float | None]:
        found = self.intervals(metrics=("mui", "loss"))
        return {
            f"{metric}_{end}": None if interval is None else getattr(interval, end)
            for metric, interval in found.items()
            for end in ("low", "high")
        }

    # Key neurons

    def key_neuron_sets(self, rule: str | None = None) -> csr_array:
        """The key neurons of each sample as a matrix of ones, uint8 ``[N, J]``, under a rule or the first one.

        Raises:
            KeyError: the pass did not count under this rule.
        """
        sets = self.counts.key_sets[0 if rule is None else self._number_of(rule)]
        return key_sets.as_sparse(sets, self.layout.n_neurons)

    def is_key_neuron(self, task: str | None = None) -> BoolArray:
        """Whether each neuron of the model is a key neuron of a task, or of any where it is None, bool ``[J]``.

        Raises:
            KeyError: there is no such task.
        """
        return key_sets.union(self._key_sets, self._is_in(self._tasks_of(task)), self.layout.n_neurons)

    def key_neurons(self, task: str | None = None) -> frozenset[KeyNeuron]:
        """The same, by name.

        Raises:
            KeyError: there is no such task.
        """
        return frozenset(self.layout.name_neuron(int(neuron)) for neuron in np.flatnonzero(self.is_key_neuron(task)))

    # Single samples

    @cached_property
    def sample_results(self) -> SampleResults:
        """What was found of each sample."""
        return SampleResults.from_counts(self.sample_table, self.counts, self._owned)

    @property
    def samples(self) -> pyarrow.Table:
        """One row for each sample: id, task, loss (nats per response token), n_tokens, n_correct (response tokens that
        are the model's first choice), choice_correct, n_key_neurons, n_key_experts (experts that own one of them) and
        shared_share (share of its key neurons that are in shared experts); null where there is no answer.

        Raises:
            ImportError: pyarrow is not installed.
        """
        return samples_table(
            self.sample_table, self.task_names, self.sample_results, has_shared=bool(self.layout.is_shared.any())
        )

    def save_samples(self, path: str | os.PathLike[str]) -> None:
        """Write `samples` as a Parquet file.

        Raises:
            ImportError: pyarrow is not installed.
            OSError: it cannot be written.
        """
        write_parquet(path, self.samples)

    # Error bars

    def estimate(self, metric: EstimatedMetric, task: str | None = None) -> Estimate | None:
        """A metric of a task, or of all tasks pooled, and what each of its samples adds to it; None without an answer.

        Args:
            metric: one of those in `mui_callback.sample_results.ESTIMATED`.
            task: by name; the influence is over the samples that it has, in their order.

        Raises:
            KeyError: there is no such task, or the metric has no error bars.
        """
        return self._estimates_of(task).estimate(metric)

    def intervals(
        self,
        task: str | None = None,
        *,
        metrics: Sequence[EstimatedMetric] = ESTIMATED,
        level: float = 0.95,
        replicates: int = 1000,
        seed: int = 0,
    ) -> dict[str, Interval | None]:
        """Confidence intervals of metrics of a task, or of all tasks pooled, by the bootstrap over its samples; see
        `mui_callback.metrics.resampling.bootstrap_intervals`.

        The same seed gives the same intervals, whatever other metrics there are. Memory beside the report is, at most,
        7 bytes for each pair of a sample and a key neuron, 25 bytes for each neuron of the model, 256 MiB (or 32 bytes
        for each sample, where that is more), and 8 bytes for each replicate of each metric.

        Args:
            task: by name.
            metrics: those that are wanted.
            level: of each interval, in (0, 1).
            replicates: of the bootstrap.
            seed: of the bootstrap.

        Returns:
            By metric; None where it has no answer, fewer than two samples, or samples that all add the same.

        Raises:
            KeyError: there is no such task, or a metric has no error bars.
            ValueError: an argument is out of its range.
        """
        estimates = self._estimates_of(task)
        found = bootstrap_intervals(
            {metric: estimates.estimate(metric) for metric in metrics}, level=level, replicates=replicates, seed=seed
        )
        known: dict[str, Interval | None] = {}
        for metric, interval in found.items():
            possible = metric_named(metric)
            known[metric] = None if interval is None else interval.within(possible.low, possible.high)
        return known

    # Counts

    @property
    def _key_sets(self) -> KeySets:
        return self.counts.key_sets[0]

    @cached_property
    def _owned(self) -> key_sets.OwnedCounts:
        return key_sets.count_owned(self._key_sets, self.layout, self.sample_table.task, len(self.task_names))

    def _number_of(self, rule: str) -> int:
        text = str(Rule.parse(rule))
        if text not in self.rules:
            raise KeyError(f"no rule {rule!r} in this report; it has {', '.join(self.rules)}")
        return self.rules.index(text)

    def _tasks_of(self, task: str | None) -> list[int]:
        if task is None:
            return list(range(len(self.task_names)))
        if task not in self.task_names:
            raise KeyError(f"no task {task!r} in this report; it has {', '.join(self.task_names)}")
        return [self.task_names.index(task)]

    def _is_in(self, tasks: list[int]) -> BoolArray:
        """Whether each sample is of one of the tasks, bool ``[N]``."""
        return np.isin(self.sample_table.task, tasks)

    def _estimates_of(self, task: str | None) -> TaskEstimates:
        is_in, sets = self._is_in(self._tasks_of(task)), self.key_neuron_sets()
        return TaskEstimates(self.layout, self.sample_results.of(is_in), sets if is_in.all() else sets[is_in])

    def _task_report(self, tasks: list[int]) -> TaskReport:
        is_in = self._is_in(tasks)
        union = key_sets.union(self._key_sets, is_in, self.layout.n_neurons)
        return TaskReport(
            layout=self.layout,
            n_samples=int(is_in.sum()),
            key_neurons=key_sets.count_in_experts(union, self.layout),
            activated=self._owned.activated_QE[tasks].sum(axis=0),
            mass=self.counts.mass[tasks].sum(axis=0),
            routed=self.counts.routed[tasks].sum(axis=0),
            predictions=self.sample_results.of(is_in).prediction_sums,
            key_expert_frequency=self.settings.key_expert_frequency,
        )

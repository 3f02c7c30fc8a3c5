"""The result of one probe pass, kept as counts from which every metric follows.

Shapes: E experts and J neurons of all layers (see `ExpertLayout`), N samples.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from mui_callback.counts import KeySets, ProbeCounts
from mui_callback.layout import ExpertLayout, KeyNeuron, LayerShape
from mui_callback.metrics import key_sets, performance
from mui_callback.metrics.catalogue import CATALOGUE, Scope, key
from mui_callback.metrics.utilization import BoolArray
from mui_callback.report_file import read_report, write_report
from mui_callback.rules import Rule
from mui_callback.sample_table import SampleTable as SampleTable
from mui_callback.settings import ProbeSettings
from mui_callback.task_report import PredictionSums, TaskReport


@dataclass(frozen=True, eq=False, repr=False)
class MUIReport:
    """What one probe pass found.

    Metrics of all tasks pooled are on `pooled`, those of one task on ``tasks[name]``; both are a `TaskReport`. They are
    those of the first of the rules that say what a key neuron is; see `under` for the others.
    """

    layout: ExpertLayout
    task_names: tuple[str, ...]
    settings: ProbeSettings
    sample_table: SampleTable
    counts: ProbeCounts
    probe_set: str
    """Fingerprint of the probe set."""
    comm_bytes: int
    """Bytes that processes sent each other for the pass: rows of the head, what the transposed tails carry, candidates,
    counts and sets. What the forward of the model itself sends is not among them."""
    seconds: float
    """Duration of the pass."""

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

    @property
    def rules(self) -> tuple[str, ...]:
        """The rules that say what a key neuron is, as text; the metrics are those of the first."""
        return tuple(map(str, self.settings.parsed_rules))

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

    # The probe itself

    @property
    def mui(self) -> float | None:
        """Model Utilization Index of all tasks pooled, in [0, 1]."""
        return self.pooled.mui

    @property
    def n_samples(self) -> int:
        """Samples in the probe."""
        return len(self.sample_table.id)

    @property
    def tokens(self) -> int:
        """Response tokens in the probe."""
        return int(self.sample_table.n_tokens.sum())

    @property
    def truncated(self) -> int:
        """Samples that were cut from the left."""
        return int(self.sample_table.truncated.sum())

    @property
    def unscored(self) -> int:
        """Samples with no response token."""
        return int((self.sample_table.n_tokens == 0).sum())

    @property
    def not_finite(self) -> int:
        """Contributions that were NaN or infinite."""
        return int(self.counts.not_finite.sum())

    @property
    def dropped_tokens(self) -> float | None:
        """Share of pairs of token and expert that routers with a limited capacity would have dropped, had the probe not
        let them pass; None without such routers."""
        assigned = int(self.counts.assigned.sum())
        return int(self.counts.dropped.sum()) / assigned if assigned else None

    @property
    def broken_samples(self) -> int:
        """Samples whose loss is NaN or infinite."""
        return int((~np.isfinite(self.counts.loss)).sum())

    @property
    def identity_error(self) -> float | None:
        """Largest relative error, over the layers, of Σ f = ⟨output of the layer, W_head[y]⟩ in the first batch."""
        errors = self.counts.identity_error[np.isfinite(self.counts.identity_error)]
        return float(errors.max()) if errors.size else None

    def scalars(self) -> dict[str, float]:
        """Everything that is logged: ``mui/<metric>`` pooled and ``mui/<task>/<metric>``.

        Keys and definitions are those of `mui_callback.metrics.catalogue`. A metric that has no answer is left out,
        so no value is None, NaN or infinite.
        """
        values: dict[str, float | None] = {}
        sources: dict[Scope, Any] = {Scope.PROBE: self, Scope.TASK: self.pooled, Scope.POOLED: self.pooled}
        for metric in CATALOGUE:
            if metric.scope in sources:
                name = "n_samples" if metric.name == "samples" else metric.name
                values[key(metric.name)] = getattr(sources[metric.scope], name)
        for name, task in self.tasks.items():
            for metric in CATALOGUE:
                if metric.scope is Scope.TASK:
                    values[key(metric.name, name)] = getattr(task, metric.name)
        return {name: float(value) for name, value in values.items() if value is not None and np.isfinite(value)}

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

    # Files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report to one file: numpy arrays and a JSON header, no pickle. Replaces the file at once.

        Raises:
            OSError: it cannot be written.
        """
        header = {
            "layers": [asdict(layer) for layer in self.layout.layers],
            "task_names": self.task_names,
            "settings": asdict(self.settings),
            "sample_ids": self.sample_table.id,
            "probe_set": self.probe_set,
            "comm_bytes": self.comm_bytes,
            "seconds": self.seconds,
        }
        arrays = {f"counts.{field.name}": getattr(self.counts, field.name) for field in fields(ProbeCounts)[1:]}
        for field in fields(SampleTable)[1:]:
            arrays[f"samples.{field.name}"] = getattr(self.sample_table, field.name)
        for number, sets in enumerate(self.counts.key_sets):
            arrays |= {f"key_sets.{number}.neuron": sets.neuron, f"key_sets.{number}.end": sets.end}
        write_report(path, header, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MUIReport:
        """Read what `save` wrote.

        Raises:
            MUIError: the file is something else, or was written by another version of this format.
            OSError: there is none, or it cannot be read.
        """
        header, arrays = read_report(path)

        def part(prefix: str) -> dict[str, Any]:
            return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}

        settings = ProbeSettings(**header["settings"])
        sets = tuple(KeySets(**part(f"key_sets.{number}.")) for number in range(len(settings.rules)))
        return cls(
            layout=ExpertLayout([LayerShape.from_dict(layer) for layer in header["layers"]]),
            task_names=tuple(header["task_names"]),
            settings=settings,
            sample_table=SampleTable(id=tuple(header["sample_ids"]), **part("samples.")),
            counts=ProbeCounts(key_sets=sets, **part("counts.")),
            probe_set=header["probe_set"],
            comm_bytes=header["comm_bytes"],
            seconds=header["seconds"],
        )

    # Counts

    @property
    def _key_sets(self) -> KeySets:
        return self.counts.key_sets[0]

    @cached_property
    def _owned(self) -> key_sets.OwnedCounts:
        return key_sets.count_owned(self._key_sets, self.layout, self.sample_table.task, len(self.task_names))

    @cached_property
    def _choices_right(self) -> tuple[BoolArray, BoolArray]:
        """Which samples have choices, and for which of them the best one is the answer."""
        table = self.sample_table
        return performance.choice_is_right(
            self.counts.choice_loss, table.choice_length, table.choice_sample, table.answer
        )

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
            predictions=self._prediction_sums(is_in),
            key_expert_frequency=self.settings.key_expert_frequency,
        )

    def _prediction_sums(self, in_tasks: BoolArray) -> PredictionSums:
        table, counts = self.sample_table, self.counts
        has_choices, right = self._choices_right
        has_bytes = in_tasks & (table.n_bytes >= 0)
        return PredictionSums(
            loss=float(counts.loss[in_tasks].sum()),
            n_tokens=int(table.n_tokens[in_tasks].sum()),
            n_correct=int(counts.correct[in_tasks].sum()),
            loss_of_bytes=float(counts.loss[has_bytes].sum()),
            n_bytes=int(table.n_bytes[has_bytes].sum()),
            n_with_choices=int((has_choices & in_tasks).sum()),
            n_right=int((right & in_tasks).sum()),
        )

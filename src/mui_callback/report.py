"""The result of one probe pass, kept as counts from which every metric follows.

Shapes: E experts of all layers (see `ExpertLayout`), N samples, C choices of all samples.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from mui_callback.counts import ProbeCounts, unpack_layers
from mui_callback.errors import MUIError
from mui_callback.layout import ExpertLayout, KeyNeuron, LayerShape
from mui_callback.metrics import performance
from mui_callback.metrics.catalogue import CATALOGUE, Scope, key
from mui_callback.metrics.utilization import BoolArray, IntArray
from mui_callback.settings import ProbeSettings
from mui_callback.task_report import PredictionSums, TaskReport

_FORMAT = "mui-report-2"


@dataclass(frozen=True, eq=False)
class SampleTable:
    """What is known of the samples without running them."""

    id: tuple[str, ...]
    task: IntArray
    """Index into the report's tasks, ``[N]``."""
    n_tokens: IntArray
    """Response tokens, ``[N]``."""
    n_bytes: IntArray
    """UTF-8 bytes of the response, -1 where they are not known, ``[N]``."""
    truncated: BoolArray
    """Whether the sample was longer than the context, ``[N]``."""
    answer: IntArray
    """Index of the right choice, -1 where there are no choices, ``[N]``."""
    choice_sample: IntArray
    """Sample of each choice, ascending."""
    choice_length: IntArray
    """UTF-8 bytes of each choice, or its tokens where the text is not known."""


@dataclass(frozen=True, eq=False, repr=False)
class MUIReport:
    """What one probe pass found.

    Metrics of all tasks pooled are on `pooled`, those of one task on ``tasks[name]``; both are a `TaskReport`.
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
        return f"MUIReport({', '.join(self.task_names)}: {self.samples} samples, mui={mui}, loss={loss})"

    @cached_property
    def tasks(self) -> Mapping[str, TaskReport]:
        """The report of each task."""
        return {name: self._task_report([index]) for index, name in enumerate(self.task_names)}

    @cached_property
    def pooled(self) -> TaskReport:
        """All tasks together: the union of their key neurons, the sum of their counts."""
        return self._task_report(list(range(len(self.task_names))))

    @property
    def mui(self) -> float | None:
        """Model Utilization Index of all tasks pooled, in [0, 1]."""
        return self.pooled.mui

    @property
    def samples(self) -> int:
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
                values[key(metric.name)] = getattr(sources[metric.scope], metric.name)
        for name, task in self.tasks.items():
            for metric in CATALOGUE:
                if metric.scope is Scope.TASK:
                    values[key(metric.name, name)] = getattr(task, metric.name)
        return {name: float(value) for name, value in values.items() if value is not None and np.isfinite(value)}

    def key_neurons(self, task: str | None = None) -> frozenset[KeyNeuron]:
        """The key neurons of a task, or of all tasks pooled, by name.

        Raises:
            KeyError: there is no such task.
        """
        if task is not None and task not in self.task_names:
            raise KeyError(f"no task {task!r} in this report; it has {', '.join(self.task_names)}")
        chosen = list(range(len(self.task_names))) if task is None else [self.task_names.index(task)]
        return frozenset(self.layout.name_neuron(int(neuron)) for neuron in np.flatnonzero(self._union(chosen)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report to one file: numpy arrays and a JSON header, no pickle. Replaces the file at once."""
        header = {
            "format": _FORMAT,
            "layers": [asdict(layer) for layer in self.layout.layers],
            "task_names": self.task_names,
            "settings": asdict(self.settings),
            "sample_ids": self.sample_table.id,
            "probe_set": self.probe_set,
            "comm_bytes": self.comm_bytes,
            "seconds": self.seconds,
        }
        arrays = {f"counts.{field.name}": getattr(self.counts, field.name) for field in fields(ProbeCounts)}
        for field in fields(SampleTable)[1:]:
            arrays[f"samples.{field.name}"] = getattr(self.sample_table, field.name)
        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                np.savez_compressed(file, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MUIReport:
        """Read what `save` wrote.

        Raises:
            MUIError: the file is something else.
        """
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
                arrays: dict[str, Any] = dict(archive)
            header = json.loads(arrays.pop("header").tobytes())
        except (ValueError, KeyError, EOFError, TypeError, BadZipFile) as error:
            raise MUIError(
                f"{path}: expected a report written by MUIReport.save, got something else ({error})"
            ) from error
        if header.get("format") != _FORMAT:
            raise MUIError(f"{path}: expected format {_FORMAT!r}, got {header.get('format')!r}")

        def part(prefix: str) -> dict[str, Any]:
            return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}

        return cls(
            layout=ExpertLayout([LayerShape.from_dict(layer) for layer in header["layers"]]),
            task_names=tuple(header["task_names"]),
            settings=ProbeSettings(**header["settings"]),
            sample_table=SampleTable(id=tuple(header["sample_ids"]), **part("samples.")),
            counts=ProbeCounts(**part("counts.")),
            probe_set=header["probe_set"],
            comm_bytes=header["comm_bytes"],
            seconds=header["seconds"],
        )

    @cached_property
    def _choices_right(self) -> tuple[BoolArray, BoolArray]:
        """Which samples have choices, and for which of them the best one is the answer."""
        table = self.sample_table
        return performance.choice_is_right(
            self.counts.choice_loss, table.choice_length, table.choice_sample, table.answer
        )

    def _union(self, tasks: list[int]) -> BoolArray:
        """Whether each neuron of the model is a key neuron of one of the tasks."""
        packed = np.bitwise_or.reduce(self.counts.key_neurons[tasks], axis=0)
        return unpack_layers(packed, [layer.n_neurons for layer in self.layout.layers])

    def _task_report(self, tasks: list[int]) -> TaskReport:
        in_tasks = np.isin(self.sample_table.task, tasks)
        return TaskReport(
            layout=self.layout,
            n_samples=int(in_tasks.sum()),
            key_neurons=np.add.reduceat(self._union(tasks).astype(np.int64), self.layout.first_neuron),
            activated=self.counts.activated[tasks].sum(axis=0),
            mass=self.counts.mass[tasks].sum(axis=0),
            routed=self.counts.routed[tasks].sum(axis=0),
            predictions=self._prediction_sums(in_tasks),
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

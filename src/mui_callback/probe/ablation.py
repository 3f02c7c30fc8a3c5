"""The causal check of key neurons and key experts: what a task loses without them, next to random controls.

Shapes: J neurons and E experts of all layers, N samples of a task, K random draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from mui_callback.errors import ProbeError
from mui_callback.metrics.ablation import LossChanges, loss_changes
from mui_callback.metrics.random_control import RandomControl, neurons_of_experts, random_experts, random_neurons
from mui_callback.metrics.rarefaction import checked_level
from mui_callback.metrics.utilization import BoolArray, FloatArray, IntArray
from mui_callback.probe.losses import Trial
from mui_callback.report import MUIReport

if TYPE_CHECKING:
    from mui_callback.probe.run import MUIProbe

What = Literal["neurons", "experts"]


@dataclass(frozen=True)
class TaskAblation:
    """One task without its key neurons, or without all neurons of its key experts."""

    n_samples: int
    """Samples with response tokens."""
    n_tokens: int
    """Their response tokens."""
    n_key: int
    """Key neurons, or key experts, and as many random ones in each draw."""
    n_masked: int
    """Neurons that are masked with the key ones."""
    n_overlap: tuple[int, ...]
    """Key ones among the random ones of each draw; more than 0 only where a layer and kind has too few others."""
    changes: LossChanges | None
    """None where there is nothing to mask, or no response token."""


@dataclass(frozen=True)
class AblationReport:
    """What `ablate` found."""

    what: What
    draws: int
    """K."""
    level: float
    """Of the intervals."""
    seed: int
    tasks: Mapping[str, TaskAblation]


def ablate(
    probe: MUIProbe,
    report: MUIReport,
    *,
    what: What = "neurons",
    tasks: Sequence[str] | None = None,
    draws: int = 3,
    level: float = 0.95,
    seed: int = 0,
) -> AblationReport:
    """Run each task without its key neurons, and without as many random ones of the same layer and kind.

    A masked neuron is one whose activation is zero for every token. The samples of a task are run 2 + `draws` times:
    with nothing masked, with the key ones, and with each random control. In a distributed run all processes make this
    call with the same report, and each returns the same.

    Where the report is of the same samples, as in arXiv 2509.23933, key neurons were chosen on what they are tested
    with; a report of other samples of the tasks is a harder test.

    Args:
        probe: the model and the samples to run.
        report: says what is key in each task; of the same model, now or at another step.
        what: ``"neurons"``, or ``"experts"``: all neurons of the key experts.
        tasks: by name; all tasks of the probe where it is None.
        draws: random controls of each task, at least 1.
        level: of the intervals, in (0, 1).
        seed: of the random controls and the bootstrap.

    Raises:
        ValueError: an argument is out of its range, a task is not in both probe and report, or the report is of a model
            with other layers.
        ProbeError: a loss is NaN or infinite; see also `MUIProbe.losses`, as for the other errors.
    """
    wanted = probe.probe_set.task_names if tasks is None else tuple(tasks)
    check_ablation(what=what, draws=draws, level=level)
    _check_report(probe, report, wanted)
    found = {}
    for task in wanted:
        plan = _Plan.of(probe, report, task, what=what, draws=draws, seed=seed)
        # all processes have to make this call, trials or none
        losses = probe.losses([Trial(plan.sample, is_masked_J) for is_masked_J in plan.masks])
        found[task] = plan.outcome(losses, level=level, seed=seed)
    return AblationReport(what, draws, level, seed, found)


@dataclass(frozen=True)
class _Plan:
    """What is run of a task."""

    where: str
    """For messages."""
    sample: IntArray
    """Its samples with response tokens, by number, ``[N]``."""
    ids: tuple[str, ...]
    n_tokens: IntArray
    """``[N]``."""
    is_key: BoolArray
    """``[J]`` or ``[E]``."""
    controls: tuple[RandomControl, ...]
    masks: tuple[BoolArray, ...]
    """Nothing, the key neurons, and each random control, ``[J]`` each; empty where there is nothing to mask or run."""

    @classmethod
    def of(cls, probe: MUIProbe, report: MUIReport, task: str, *, what: What, draws: int, seed: int) -> _Plan:
        """Of a task of the probe and the report."""
        index, table, layout = probe.probe_set.task_names.index(task), probe.sample_table, probe.layout
        rng = np.random.default_rng((seed, index))
        sample = np.flatnonzero((table.task == index) & (table.n_tokens > 0))
        if what == "neurons":
            is_key = report.is_key_neuron(task)
            controls = tuple(random_neurons(layout, is_key, rng) for _ in range(draws))
            masks = [is_key, *(control.is_drawn for control in controls)]
        else:
            is_key = report.tasks[task].key_experts
            controls = tuple(random_experts(layout, is_key, rng) for _ in range(draws))
            masks = [neurons_of_experts(layout, is_in_E) for is_in_E in (is_key, *(c.is_drawn for c in controls))]
        is_anything = len(sample) > 0 and is_key.any()
        return cls(
            where=f"task {task!r}, key {what}",
            sample=sample,
            ids=tuple(table.id[number] for number in sample),
            n_tokens=table.n_tokens[sample],
            is_key=is_key,
            controls=controls,
            masks=(np.zeros_like(masks[0]), *masks) if is_anything else (),
        )

    def outcome(self, losses: Sequence[FloatArray], *, level: float, seed: int) -> TaskAblation:
        """From the losses under each of the masks, ``[N]`` each.

        Raises:
            ProbeError: one is NaN or infinite.
        """
        for number, loss_N in enumerate(losses):
            if not np.isfinite(loss_N).all():
                which = ("nothing", "the key ones", f"random ones (draw {number - 1})")[min(number, 2)]
                ids = [id for id, is_finite in zip(self.ids, np.isfinite(loss_N), strict=True) if not is_finite]
                raise ProbeError(
                    f"{self.where}: expected finite losses, got NaN or infinity in {len(ids)} of {len(self.ids)} "
                    f"samples with {which} masked, first in {ids[0]}"
                )
        return TaskAblation(
            n_samples=len(self.sample),
            n_tokens=int(self.n_tokens.sum()),
            n_key=int(self.is_key.sum()),
            n_masked=int(self.masks[1].sum()) if self.masks else 0,
            n_overlap=tuple(control.n_overlap for control in self.controls),
            changes=loss_changes(losses[0], losses[1], np.stack(losses[2:]), self.n_tokens, level=level, seed=seed)
            if losses
            else None,
        )


def check_ablation(*, what: object, draws: object, level: float) -> None:
    """Raises ValueError for an argument of `ablate` that is out of its range."""
    if what not in get_args(What):
        raise ValueError(f"what: expected one of {', '.join(get_args(What))}, got {what!r}")
    if not isinstance(draws, int) or draws < 1:
        raise ValueError(f"draws: expected a positive number of random controls, got {draws!r}")
    checked_level(level)


def _check_report(probe: MUIProbe, report: MUIReport, tasks: Sequence[str]) -> None:
    if report.layout != probe.layout:
        raise ValueError(
            f"expected a report of a model with the layers of this one, {probe.layout}, got {report.layout}"
        )
    for where, names in (("probe set", probe.probe_set.task_names), ("report", report.task_names)):
        if unknown := set(tasks) - set(names):
            raise ValueError(f"expected tasks of the {where}, {', '.join(names)}, got {', '.join(sorted(unknown))}")

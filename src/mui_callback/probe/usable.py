"""A probe that can be used, and its report: with something to score, batches as large as memory allows, and losses that
are numbers."""

from __future__ import annotations

import numpy as np
import torch

from mui_callback.errors import ProbeError, ProbeSetError
from mui_callback.forgiving import warn
from mui_callback.parallel.processes import in_words
from mui_callback.probe.run import MUIProbe
from mui_callback.report import MUIReport


def usable(probe: MUIProbe) -> MUIProbe:
    """The probe, where there is something to score in each of its tasks; single samples without are warned of.

    Raises:
        ProbeSetError: no sample of a task has a response token, so that nothing would be measured.
    """
    samples = probe.sample_table
    is_unscored = samples.n_tokens == 0
    for number, task in enumerate(probe.probe_set.task_names):
        of_task = is_unscored[samples.task == number]
        if of_task.all():
            raise ProbeSetError(
                f"task {task!r}: expected tokens to score, got none in {len(of_task)} samples: all their labels are "
                "-100, or they have one token each, which nothing predicts"
            )
    if is_unscored.any():
        ids = [samples.id[sample] for sample in np.flatnonzero(is_unscored)]
        shown = ", ".join(ids[:3] + ["..."] * (len(ids) > 3))
        warn(
            f"MUI: {len(ids)} of {len(is_unscored)} probe samples have no response token; they count as samples that "
            f"need no neuron: {shown}"
        )
    return probe


def measure_usable(probe: MUIProbe) -> MUIReport:
    """Measure; with batches half the size if memory runs out in any process, down to single samples.

    Raises:
        ProbeError: losses are NaN or infinite; or see `MUIProbe.measure`, as the following.
        DesynchronizedError: …
        InterruptedPassError: …
        Exception: whatever the model raises.
    """
    while True:
        outcome = probe.try_measure()
        if outcome.report is not None:
            return _checked(outcome.report)
        failures = outcome.failures
        if not all(failure.out_of_memory for failure in failures) or not probe.halve_batches():
            raise outcome.error or ProbeError(in_words(failures))
        del outcome  # the traceback of its error holds the tensors of the pass
        torch.cuda.empty_cache()
        warn(
            f"MUI: out of memory in a probe; going on with batches of {probe.settings.batch_tokens} tokens "
            f"({in_words(failures)})"
        )


def _checked(report: MUIReport) -> MUIReport:
    if report.broken_samples:
        raise ProbeError(
            f"the loss of {report.broken_samples} of {report.n_samples} samples is NaN or infinite: the model puts "
            "out no usable logits"
        )
    return report

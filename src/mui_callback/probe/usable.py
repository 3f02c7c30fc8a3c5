"""Checks of a probe and of its report, and batches that are made smaller where memory runs out."""

from __future__ import annotations

import numpy as np
import torch

from mui_callback.errors import ProbeError, ProbeSetError
from mui_callback.forgiving import warn
from mui_callback.parallel.processes import in_words
from mui_callback.probe.run import MUIProbe
from mui_callback.probe.samples import first_few
from mui_callback.report import MUIReport
from mui_callback.sample_table import SampleTable


def check_scored(probe: MUIProbe) -> MUIProbe:
    """Refuse a probe with a task in which nothing is scored, and warn of single samples in which nothing is.

    Returns:
        The probe.

    Raises:
        ProbeSetError: no sample of a task has a response token or choices, so that nothing would be measured.
    """
    samples = probe.sample_table
    is_silent = samples.n_tokens == 0
    is_silent[samples.choice_sample] = False
    for number, task in enumerate(probe.probe_set.task_names):
        of_task = samples.task == number
        if is_silent[of_task].all():
            cut = f" or were cut off (max_length: {probe.settings.max_length})"
            raise ProbeSetError(
                f"task {task!r}: expected tokens to score, got none in {of_task.sum()} samples: all their labels are "
                f"-100{cut if samples.truncated[of_task].any() else ''}, or they have one token each, which nothing "
                "predicts."
            )
    unscored = unscored_in_words(samples)
    if unscored is not None:
        warn(f"MUI: {unscored}")
    return probe


def unscored_in_words(samples: SampleTable) -> str | None:
    """How many samples have no response token, and the first of them; None where all have some."""
    ids = [samples.id[sample] for sample in np.flatnonzero(samples.n_tokens == 0)]
    if not ids:
        return None
    return (
        f"{len(ids)} of {len(samples.id)} samples have no response token; they count as samples that need no neuron: "
        f"{', '.join(first_few(ids))}"
    )


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

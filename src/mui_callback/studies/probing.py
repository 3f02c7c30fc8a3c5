"""Load a model and probe it once, as every study begins."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from transformers.utils import logging as transformers_logging

from mui_callback.loading import load_tokenizer
from mui_callback.model_options import ModelOptions
from mui_callback.probe.default import builtin_for
from mui_callback.probe.probe_set import ProbeSet
from mui_callback.probe.run import MUIProbe
from mui_callback.probe.usable import unscored_in_words
from mui_callback.report import MUIReport


def read_samples(files: Sequence[Path] | None) -> ProbeSet | None:
    """The samples of JSONL files, one task each, which is named after the file; None stands for the built-in ones.

    Raises:
        MUIError: a file cannot be read, or two have the same stem.
    """
    return None if files is None else ProbeSet.from_jsonl(list(files))


def open_probe(options: ModelOptions, probe_set: ProbeSet | None, console: Console) -> MUIProbe:
    """Load a model to be probed, and say what it is.

    Args:
        options: the model, which needs a tokenizer if the samples are text.
        probe_set: the samples; the built-in ones where it is None.
        console: where to print.

    Raises:
        MUIError: the model cannot be loaded, has no layer that can be probed, or does not fit the samples.
    """
    transformers_logging.set_verbosity_error()
    if not console.is_terminal:
        transformers_logging.disable_progress_bar()
    name = escape(str(options.source))
    with console.status(f"loading {name}"):
        model, tokenizer = options.load(), load_tokenizer(options.source)
    if probe_set is None:
        probe_set = builtin_for(model, tokenizer, "the model has no tokenizer, which the built-in samples need")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        probe = MUIProbe(model, probe_set, tokenizer=tokenizer, **asdict(options.settings))
    for warning in caught:
        if warning.category is UserWarning:  # such as which samples are cut
            console.print(str(warning.message), style="yellow", highlight=False, markup=False)
    neurons, experts = probe.layout.n_neurons, probe.layout.n_experts
    console.print(
        f"[bold]{name}[/]: {type(model).__name__}, {neurons:,} neurons in {experts:,} experts",
        highlight=False,
        soft_wrap=True,
    )
    return probe


def measure(probe: MUIProbe, console: Console) -> MUIReport:
    """Probe the model, and say which samples tell nothing."""
    with console.status(f"probing {len(probe.probe_set):,} samples"):
        report = probe.measure()
    unscored = unscored_in_words(report.sample_table)
    if unscored is not None:
        console.print(unscored, style="yellow", highlight=False, markup=False)
    return report

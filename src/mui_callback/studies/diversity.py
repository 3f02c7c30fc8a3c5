"""`mui-callback diversity`: which data needs more of a model's neurons, at equal numbers of samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mui_callback.metrics.diversity import common_size
from mui_callback.metrics.rarefaction import checked_level
from mui_callback.model_options import ModelOptions
from mui_callback.probe.probe_set import ProbeSet
from mui_callback.studies.data_sets import DiversityStudy, diversity_of
from mui_callback.studies.probing import measure, open_probe
from mui_callback.studies.record import check_writable, write_study
from mui_callback.studies.screen import show_diversity, show_files


def compare_diversity(
    options: ModelOptions,
    data: Sequence[Path],
    *,
    at: int | None = None,
    level: float = 0.95,
    picture: Path | None = None,
    record: Path | None = None,
    console: Console,
) -> DiversityStudy:
    """Print how diverse data sets are to a model, and draw their coverage curves.

    Args:
        options: the model, with its tokenizer.
        data: JSONL files, one data set each, which is named after the file.
        at: number of samples to compare at; by default that of the smallest data set.
        level: of the confidence intervals, in (0, 1).
        picture: the PNG to draw; its directory must be there.
        record: the JSON file to write; the same.
        console: where to print.

    Raises:
        MUIError: a file cannot be read, two have the same stem, the model cannot be probed with them, or there is no
            place for what is to be written.
        ValueError: `at` is more samples than a data set has, or the level is not in (0, 1).
    """
    probe_set = ProbeSet.from_jsonl(list(data))
    common_size({name: len(samples) for name, samples in probe_set.tasks.items()}, at)
    checked_level(level)
    check_writable(picture, ".png")
    check_writable(record, ".json")
    report = measure(open_probe(options, probe_set, console), console)
    sets = {name: report.key_neuron_sets()[report.sample_table.task == i] for i, name in enumerate(report.task_names)}
    n_tokens = {name: task.predictions.n_tokens for name, task in report.tasks.items()}
    study = diversity_of(sets, n_tokens, at=at, level=level)
    show_diversity(console, study)
    if picture is not None:
        from mui_callback.studies.picture import save_coverage_curves

        save_coverage_curves(study, picture, title=str(options.source))
    if record is not None:
        write_study(record, "diversity", options, vars(study))
    show_files(console, {"Coverage curves": picture, "All numbers": record})
    return study

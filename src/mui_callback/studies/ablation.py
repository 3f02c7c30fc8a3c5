"""`mui-callback ablate`: whether a model needs its key neurons, or key experts, more than random ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mui_callback.model_options import ModelOptions
from mui_callback.probe.ablation import AblationReport, What, ablate, check_ablation
from mui_callback.studies.ablation_screen import show_ablation
from mui_callback.studies.probing import measure, open_probe, read_samples
from mui_callback.studies.record import check_writable, write_study
from mui_callback.studies.screen import show_files


def check_key(
    options: ModelOptions,
    probe: Sequence[Path] | None = None,
    *,
    what: What = "neurons",
    draws: int = 3,
    level: float = 0.95,
    seed: int = 0,
    record: Path | None = None,
    console: Console,
) -> AblationReport:
    """Print what each task loses without what is key in it, and without as many random ones.

    Args:
        options: the model, with its tokenizer.
        probe: JSONL files of samples, one task each, which is named after the file; by default the built-in ones.
        what: see `mui_callback.probe.ablation.ablate`, as the following.
        draws: …
        level: …
        seed: …
        record: the JSON file to write; its directory must be there.
        console: where to print.

    Raises:
        MUIError: a file cannot be read, two have the same stem, there is no place for the record, the model cannot be
            probed with the samples, or a loss is not finite.
        ValueError: an argument is out of its range.
    """
    check_ablation(what=what, draws=draws, level=level)
    check_writable(record, ".json")
    opened = open_probe(options, read_samples(probe), console)
    report = measure(opened, console)
    with console.status(f"running each task {2 + draws} times"):
        found = ablate(opened, report, what=what, draws=draws, level=level, seed=seed)
    show_ablation(console, found)
    if record is not None:
        write_study(record, "ablate", options, vars(found))
        show_files(console, {"All numbers": record})
    return found

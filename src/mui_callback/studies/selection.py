"""`mui-callback select`: the few samples that need most of what all of them need, as a probe set of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mui_callback.errors import MUIError
from mui_callback.metrics.max_coverage import Selection, greedy_max_coverage
from mui_callback.metrics.utilization import IntArray
from mui_callback.model_options import ModelOptions
from mui_callback.probe.probe_set import ProbeSet
from mui_callback.probe.writers import sample_row, write_rows
from mui_callback.studies.probing import measure, open_probe
from mui_callback.studies.record import check_writable, write_study
from mui_callback.studies.screen import show_cost, show_files, show_selection, show_written


def select_samples(
    options: ModelOptions,
    probe: Sequence[Path],
    *,
    size: int,
    output: Path,
    record: Path | None = None,
    console: Console,
) -> Selection:
    """Choose samples that keep the coverage of all, write them, and print how much they keep.

    Args:
        options: the model, with its tokenizer.
        probe: JSONL files of samples, one task each, which is named after the file.
        size: samples to choose, of all tasks together; fewer are chosen where fewer keep everything.
        output: the directory to write to, one file for each task that samples are chosen of; made if it is not there.
            Nothing is overwritten: it must be empty.
        record: the JSON file to write, with the share kept at each size; its directory must be there.
        console: where to print.

    Raises:
        MUIError: a file cannot be read, two have the same stem, there are fewer samples than `size`, there is something
            at `output`, there is no place for the record, or the model cannot be probed with the samples.
        ValueError: no sample has a key neuron.
    """
    probe_set = ProbeSet.from_jsonl(list(probe))
    if not 1 <= size <= len(probe_set):
        raise MUIError(f"size: expected a number of samples from 1 to the {len(probe_set)} that there are, got {size}")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise MUIError(f"{output}: expected a new or an empty directory to write to, as nothing is overwritten")
    check_writable(record, ".json")
    report = measure(open_probe(options, probe_set, console), console)
    table = report.sample_table
    selection = greedy_max_coverage(report.key_neuron_sets(), table.task, size)
    show_selection(console, selection, report.task_names, size)
    show_cost(console, table.n_tokens, selection.order)
    show_written(console, output, write_samples(probe_set, selection.order, output))
    if record is not None:
        chosen = [{"task": report.task_names[table.task[i]], "id": table.id[i]} for i in selection.order]
        found = {"tasks": report.task_names, "samples": chosen, "kept": selection.kept, "random": selection.random}
        write_study(record, "select", options, found)
        show_files(console, {"All numbers": record})
    return selection


def write_samples(probe_set: ProbeSet, order: IntArray, directory: Path) -> dict[Path, int]:
    """Write samples as JSONL that `ProbeSet.from_jsonl` reads back, one file for each task.

    Args:
        probe_set: text samples.
        order: indices of the samples to write, counted through all tasks. A file has them in this order, and each row
            its place in it as ``rank``, from 1.
        directory: made if it is not there; has none of the files.

    Returns:
        The number of samples in each file, in the order of the tasks.

    Raises:
        FileExistsError: it has one of the files.
        ProbeSetError: a sample is of tokens.
    """
    directory.mkdir(parents=True, exist_ok=True)
    samples = [(task, sample) for task, group in probe_set.tasks.items() for sample in group]
    rows: dict[str, list[dict[str, object]]] = {task: [] for task in probe_set.task_names}
    for rank, index in enumerate(order.tolist(), start=1):
        task, sample = samples[index]
        rows[task].append({**sample_row(sample), "rank": rank})
    written = {directory / f"{task}.jsonl": of_task for task, of_task in rows.items() if of_task}
    for path, of_task in written.items():
        write_rows(path, of_task)
    return {path: len(of_task) for path, of_task in written.items()}

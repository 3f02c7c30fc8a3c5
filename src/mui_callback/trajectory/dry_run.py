"""`mui-callback trajectory --dry-run`: what a study would do, with sizes and cost; nothing is downloaded or written."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.text import Text

from mui_callback.experts.discover import find_expert_layers
from mui_callback.forgiving import attempt
from mui_callback.inspection.cost import ProbeCost, cost_of
from mui_callback.inspection.describe import describe
from mui_callback.probe.probe_set import ProbeSet
from mui_callback.responses.prompts import gold_samples
from mui_callback.studies.screen import plain_table
from mui_callback.trajectory.checkpoint import in_tokens
from mui_callback.trajectory.config import StudyConfig
from mui_callback.trajectory.crew import Crew
from mui_callback.trajectory.failures import in_words
from mui_callback.trajectory.listing import StudiedCheckpoint
from mui_callback.trajectory.planning import StudyPlan

_SIDE, _SECONDS = 2048, 0.3


@dataclass(frozen=True)
class _Size:
    """Of a checkpoint, in bytes."""

    whole: int
    to_fetch: int


def show_plan(config: StudyConfig, console: Console) -> bool:
    """Print the plan of a study.

    Args:
        config: of the study.
        console: where to print.

    Returns:
        Whether every checkpoint is there.

    Raises:
        MUIError: see `StudyPlan.of`.
    """
    with console.status("looking for the checkpoints"):
        plan = StudyPlan.of(config)
        looked = {one: attempt(partial(_size, one)) for one in plan.checkpoints}
    sizes = {one: size for one, (size, _) in looked.items() if size is not None}
    missing = {one: in_words(error) for one, (_, error) in looked.items() if error is not None}
    left = [one for one in sizes if plan.record(one) is None]
    console.print(
        Text(f"{config.title}: {len(plan.checkpoints)} checkpoints, {len(plan.tasks)} tasks, in {config.output}")
    )
    _show_checkpoints(console, plan, sizes, missing)
    _show_disk(console, config, [sizes[one] for one in left])
    _show_tasks(console, plan)
    if left:
        _show_cost(console, plan, left)
    return not missing


def _size(checkpoint: StudiedCheckpoint) -> _Size:
    return _Size(checkpoint.place.n_bytes, checkpoint.place.n_bytes_to_fetch)


def _show_checkpoints(
    console: Console,
    plan: StudyPlan,
    sizes: Mapping[StudiedCheckpoint, _Size],
    missing: Mapping[StudiedCheckpoint, str],
) -> None:
    table = plain_table("model", "checkpoint", "step", "tokens", "size", "to\ndownload")
    table.columns[1].justify = "left"
    table.add_column("")
    for one in plan.checkpoints:
        size = sizes.get(one)
        state = "measured" if plan.record(one) is not None else "to do"
        table.add_row(
            Text(one.id.model),
            Text(one.id.label),
            "-" if one.id.step is None else f"{one.id.step:,}",
            "-" if one.id.tokens is None else in_tokens(one.id.tokens),
            "-" if size is None else decimal(size.whole),
            "-" if size is None or not size.to_fetch else decimal(size.to_fetch),
            Text("not found", style="red") if one in missing else state,
        )
    console.print(table)
    for one, why in missing.items():
        console.print(Text(f"not found: {one.id}: {why}", style="red"), soft_wrap=True)


def _show_disk(console: Console, config: StudyConfig, left: Sequence[_Size]) -> None:
    to_fetch = [size.to_fetch for size in left if size.to_fetch]
    if not to_fetch:
        return
    n_at_once = len(to_fetch) if config.keep_checkpoints is None else min(len(to_fetch), 2 + config.keep_checkpoints)
    most = sum(sorted(to_fetch)[-n_at_once:])
    console.print(
        f"To download: {decimal(sum(to_fetch))}; on the disk at a time: {decimal(most)} at most, "
        f"{n_at_once} checkpoints."
    )


def _show_tasks(console: Console, plan: StudyPlan) -> None:
    for task in plan.tasks:
        n = len(task.samples)
        answers = (
            f", answers of up to {task.config.max_new_tokens} tokens" if plan.config.response == "generate" else ""
        )
        shots = f", {task.config.few_shot} examples before each" if task.config.few_shot else ""
        console.print(Text(f"{task.name}: {n:,} sample{'' if n == 1 else 's'}{shots}{answers}"))


def _show_cost(console: Console, plan: StudyPlan, left: Sequence[StudiedCheckpoint]) -> None:
    """Of the probes, by counting; and of all that comes with them, from what was measured already."""
    device = Crew.from_environment(plan.config.distribute).device(plan.config.device)
    seconds_left = 0.0
    for model in dict.fromkeys(one.id.model for one in left):
        own = [one for one in left if one.id.model == model]
        cost, error = attempt(partial(_cost, plan, own[0]))
        if cost is None:
            console.print(Text(f"{model}: its cost is not known ({in_words(error) if error else ''})", style="yellow"))
            continue
        flops = cost.forward_flops + cost.score_flops
        rate = _rate(device, own[0].config.dtype)
        console.print(
            f"A probe of {model}: {cost.positions:,} positions in {cost.passes:,} forward passes, {flops:.2g} "
            f"operations, at least {_time(flops / rate)} at the {rate / 1e12:.2g} TFLOP/s at which {device} "
            "multiplies matrices.",
            markup=False,
        )
        seconds = [
            sum(record.seconds.values())
            for one in plan.checkpoints
            if (record := plan.record(one)) and one.id.model == model
        ]
        each = median(seconds) if seconds else flops / rate
        seconds_left += len(own) * each
        if seconds:
            console.print(
                f"So far a checkpoint of it took {_time(each)}, loading and answers included, without downloads."
            )
    console.print(f"All that is left: at least {_time(seconds_left)} in one process.")


def _cost(plan: StudyPlan, checkpoint: StudiedCheckpoint) -> ProbeCost:
    skeleton, tokenizer = checkpoint.load_skeleton(), checkpoint.load_tokenizer()
    settings = plan.config.probe
    layers = find_expert_layers(skeleton, dense=settings.dense)
    samples = {task.name: gold_samples(task, tokenizer, chat=checkpoint.config.chat) for task in plan.tasks}
    shown = describe(skeleton, layers, settings.parsed_rules[0])
    return cost_of(skeleton, layers, shown, tokenizer, settings, ProbeSet(samples))


def _rate(device: str, dtype: str) -> float:
    """Operations a second of a product of two matrices."""
    kind = torch.float32 if dtype in ("auto", "float32") and device == "cpu" else torch.bfloat16
    a = torch.ones(_SIDE, _SIDE, device=device, dtype=kind)
    n, start = 0, time.perf_counter()
    while n < 2 or time.perf_counter() - start < _SECONDS:
        float((a @ a)[0, 0])  # waits for the device
        n += 1
    return n * 2.0 * _SIDE**3 / (time.perf_counter() - start)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

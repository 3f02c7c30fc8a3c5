"""One run: a model is trained and looked into on the way; at the end it is asked what it misses."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mui_callback import MUIProbe, MUIReport, ProbeSet
from mui_callback.demo.corpus import Corpus, load_corpus
from mui_callback.demo.model import build_tokenizer
from mui_callback.demo.packing import Row
from mui_callback.metrics.phases import PhaseRule
from mui_callback.metrics.trajectory import Trajectories, TrajectoryPoint, kept, phase_at
from mui_callback.metrics.utilization import top_experts
from mui_callback.monitoring.performance_axis import from_probe
from mui_callback.probe.samples import ProbeSample
from mui_callback.task_report import TaskReport
from mui_callback.whole_file import replaced_at_once

from .causal import without_key_ones, without_one_a_layer
from .variants import Variant, active_parameters, build_model, digest, training_rows

POOLED = "all tasks"
"""In the column ``task``."""
METRICS = (
    "loss",
    "token_accuracy",
    "choice_accuracy",
    "mui",
    "key_expert_proportion",
    "key_expert_mui",
    "shared_share",
    "shared_mass_share",
    "shared_fair_ratio",
    "shared_in_top10",
    "expert_gini",
    "expert_diversity",
    "effective_experts",
    "mass_gini",
    "routing_rank_correlation",
    "dead_experts",
    "load_variation",
)

_RULE = f"top_fraction={1 / 128}"
"""Of a sample, 4 neurons of a layer of 8 experts, or 8 of one of 16; the usual 0.1 % would be none."""
_LEARNING_RATE = 3e-3
_WARMUP = 50


@dataclass(frozen=True)
class Settings:
    """What all runs have in common."""

    steps: int = 800
    rows_a_step: int = 8
    probes: int = 12
    """At equal distances; besides, one before the first step and a few more before the first of them."""
    samples: int = 48
    """Held-out samples of each task that are probed; the neurons that they name are masked for as many others."""
    draws: int = 5
    """Random controls of each mask."""

    @property
    def probe_steps(self) -> tuple[int, ...]:
        """Where a run is probed."""
        regular = [round(self.steps * number / self.probes) for number in range(self.probes + 1)]
        return tuple(sorted({*regular, regular[1] // 4, regular[1] // 2}))


QUICK = Settings(steps=12, rows_a_step=1, probes=4, samples=4, draws=2)


def run_path(output: Path, variant: Variant, seed: int) -> Path:
    """Where a run is kept."""
    return output / "runs" / f"{variant.slug}-{seed}.json"


def run(variant: Variant, seed: int, settings: Settings, output: Path) -> str:
    """Train one model from one seed, and keep what was found.

    Returns:
        The end of it, in words.
    """
    start = time.process_time()
    tokenizer = build_tokenizer()
    corpus = _corpus(2 * settings.samples)
    rows = training_rows(corpus, tokenizer, settings.steps * settings.rows_a_step, seed)
    model = build_model(variant, tokenizer, seed)
    n_parameters, n_active = model.num_parameters(), active_parameters(model, variant)
    named, tested = (
        MUIProbe(model, ProbeSet(samples), tokenizer=tokenizer, rules=_RULE)
        for samples in _halves(corpus.held_out, settings.samples)
    )
    reports: dict[int, MUIReport] = {}
    for step in _trained(model, rows, settings):
        if step in settings.probe_steps:
            reports[step] = named.measure()
    last = reports[settings.steps]
    found = {
        "settings": asdict(settings),
        "variant": asdict(variant),
        "seed": seed,
        "data": digest(rows),
        "parameters": n_parameters,
        "active_parameters": n_active,
        "rows": _rows(reports),
        "causal": [*without_key_ones(tested, last, settings.draws), *without_one_a_layer(tested, last, settings.draws)],
        "seconds": time.process_time() - start,
    }
    path = run_path(output, variant, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_at_once(path) as partial:
        partial.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return f"loss {last.pooled.loss:.2f}, MUI {100 * (last.mui or 0):.1f} %, {found['seconds']:.0f} s"


@cache
def _corpus(n_held_out: int) -> Corpus:
    """The same for all runs: what differs with the seed is the order of what is in it."""
    return load_corpus(n_held_out=n_held_out)


def _halves(held_out: Mapping[str, Sequence[ProbeSample]], n: int) -> list[dict[str, Sequence[ProbeSample]]]:
    """The samples that name key neurons, and those that they are tested with."""
    return [{task: samples[half] for task, samples in held_out.items()} for half in (slice(n), slice(n, None))]


def _trained(model: Any, rows: list[Row], settings: Settings) -> Iterator[int]:
    """The number of steps done, from 0 on."""
    n = settings.rows_a_step
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = max(1, min(_WARMUP, settings.steps // 4))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * step / settings.steps)),
    )
    yield 0
    for step in range(settings.steps):
        batch = rows[step * n : step * n + n]
        loss = model(**{name: torch.stack([row[name] for row in batch]) for name in batch[0]}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield step + 1


def _rows(reports: Mapping[int, MUIReport]) -> list[dict[str, Any]]:
    """One for each probe and task."""
    trajectories: Trajectories = {}
    rows = []
    for step, report in reports.items():
        for task in (None, *report.task_names):
            seen = report.pooled if task is None else report.tasks[task]
            axis, mui = from_probe(report, task), report.estimate("mui", task)
            assert axis is not None
            assert mui is not None
            points = trajectories.setdefault(task, {})
            points[step] = TrajectoryPoint(*axis, kept(mui))
            phase = phase_at(points, step, PhaseRule())
            assert phase is not None
            rows.append(
                {
                    "step": step,
                    "task": task or POOLED,
                    **{metric: getattr(seen, metric) for metric in METRICS},
                    "shared_on_top": _shared_on_top(seen),
                    "performance": axis[1].value,
                    "phase": phase.call.phase.value,
                    "has_phase": len(points) >= PhaseRule().window,
                }
            )
    return rows


def _shared_on_top(seen: TaskReport) -> float | None:
    """Share of the shared experts that are among as many experts with the highest activated frequency."""
    n_shared = int(seen.layout.is_shared.sum())
    top = top_experts(seen.activated_frequency, seen.expert_mui, n_shared)
    return float(seen.layout.is_shared[top].mean()) if n_shared else None

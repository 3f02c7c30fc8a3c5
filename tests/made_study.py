"""A study as it comes from real checkpoints: two tiny models that are trained a little, measured now and then.

``python tests/made_study.py DIR`` makes one to look at.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mui_callback import MUIProbe, MUIReport, ProbeSet
from mui_callback.metrics.phases import Point
from mui_callback.metrics.trajectory import TrajectoryPoint, kept
from mui_callback.monitoring.performance_axis import from_probe
from mui_callback.probe.samples import ProbeSample
from mui_callback.trajectory.checkpoint import CheckpointId
from mui_callback.trajectory.records import CheckpointRecord, write_plan, write_record
from mui_callback.trajectory.rows import rows_of
from tiny import build

IDENTITY = {"probe_set": "built-in", "rules": ["top_fraction=0.05"], "response": "gold"}
CONFIG = {"response": "gold", "note": "tests"}
STEPS = (0, 2, 5, 9, 14, 20)
TOKENS_PER_STEP = 100e6
MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "olmoe-tiny": ("olmoe", {"num_experts": 8, "num_hidden_layers": 4, "intermediate_size": 16}),
    "qwen-shared": ("qwen2_moe", {"num_experts": 6, "num_hidden_layers": 3}),
}


def in_bytes(text: str) -> list[int]:
    return [3 + byte for byte in text.encode()]


def probe_samples(n: int, names: Mapping[str, str] | None = None) -> ProbeSet:
    """The first n samples of each built-in task."""
    tasks = ProbeSet.builtin().tasks
    return ProbeSet({(names or {}).get(task, task): samples[:n] for task, samples in tasks.items()})


def checkpoint_at(model: str, step: int) -> CheckpointId:
    tokens = step * TOKENS_PER_STEP
    return CheckpointId(model, f"step{step}-tokens{tokens / 1e9:g}B", step, tokens)


def points_of(report: MUIReport) -> dict[str | None, TrajectoryPoint]:
    points: dict[str | None, TrajectoryPoint] = {}
    for task in (None, *report.task_names):
        performance, mui = from_probe(report, task), report.estimate("mui", task)
        if performance is not None and mui is not None:
            of_mui: Point = kept(mui)
            points[task] = TrajectoryPoint(*performance, of_mui)
    return points


def keep(directory: Path, checkpoint: CheckpointId, report: MUIReport) -> None:
    points = points_of(report)
    rows = rows_of(checkpoint, report, points, response="gold")
    record = CheckpointRecord(checkpoint, None, IDENTITY, rows, points, [], {"load": 1.0, "probe": 2.0}, directory)
    write_record(directory, record, report)


def make_study(
    directory: Path,
    models: Sequence[str] = tuple(MODELS),
    *,
    n_samples: int = 8,
    names: Mapping[str, str] | None = None,
) -> Path:
    """Train, measure and keep what was found."""
    planned = [checkpoint_at(model, step) for model in models for step in STEPS]
    write_plan(
        directory,
        name="Two tiny models",
        identities=dict.fromkeys(models, IDENTITY),
        checkpoints=planned,
        config=CONFIG,
    )
    for model in models:
        family, sizes = MODELS[model]
        _train(directory, model, build(family, seed=1, hidden_size=32, **sizes), probe_samples(n_samples, names))
    return directory


def _train(directory: Path, name: str, model: PreTrainedModel, probe_set: ProbeSet) -> None:
    torch.manual_seed(0)
    text = "\n".join(
        sample.prompt + sample.response
        for samples in ProbeSet.builtin().tasks.values()
        for sample in samples
        if isinstance(sample, ProbeSample)
    )
    data = torch.tensor(in_bytes(text))
    probe = MUIProbe(model, probe_set, tokenizer=in_bytes, rules="top_fraction=0.05", max_length=160)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(max(STEPS) + 1):
        if step in STEPS:
            keep(directory, checkpoint_at(name, step), probe.measure())
        starts = torch.randint(len(data) - 128, (8,)).tolist()
        batch = torch.stack([data[start : start + 128] for start in starts])
        model.train()
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        model.eval()


if __name__ == "__main__":
    make_study(Path(sys.argv[1]))

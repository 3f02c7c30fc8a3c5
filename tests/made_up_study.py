"""Studies of any shape from counts that are made up, without a model.

``python tests/made_up_study.py DIR [MODELS CHECKPOINTS TASKS LAYERS EXPERTS]`` makes one to look at.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from made import make_report
from made_study import IDENTITY, keep
from mui_callback import MUIReport
from mui_callback.layout import ExpertLayout, LayerShape
from mui_callback.trajectory.checkpoint import CheckpointId
from mui_callback.trajectory.records import write_plan

_SAMPLES = 12


def layout_of(n_layers: int = 2, n_experts: int = 4, n_shared: int = 0) -> ExpertLayout:
    return ExpertLayout([LayerShape(i, f"layers.{i}", n_experts, 16, (16,) * n_shared) for i in range(n_layers)])


def some_report(layout: ExpertLayout, tasks: Sequence[str], progress: float, seed: int = 0) -> MUIReport:
    """Few neurons that many samples share; more of them up to the middle of training, and then fewer, as loss falls."""
    rng = np.random.default_rng(seed)
    n, n_keys = len(tasks) * _SAMPLES, max(4, layout.n_neurons // 50)
    pool = int(layout.n_neurons * (0.2 + 0.6 * progress * (1.3 - progress)))
    samples = []
    for _ in range(n):
        drawn = np.minimum(rng.exponential(pool / 4, n_keys), layout.n_neurons - 1).astype(int)
        samples.append(set(np.random.default_rng(7).permutation(layout.n_neurons)[drawn].tolist()))
    return make_report(
        samples,
        [i // _SAMPLES for i in range(n)],
        layout=layout,
        task_names=tasks,
        loss=4 * (3 - 2 * progress) * (1 + 0.05 * np.random.default_rng(1).random(n)),
        routed=rng.integers(0, 50, (len(tasks), layout.n_experts)),
    )


def make_up_study(
    directory: Path,
    planned: Sequence[CheckpointId],
    tasks: Sequence[str] = ("a", "b"),
    *,
    layout: ExpertLayout | None = None,
    name: str = "made up",
    left_out: Sequence[int] = (),
) -> Path:
    """A study of these checkpoints.

    Args:
        directory: for it.
        planned: its checkpoints.
        tasks: of each.
        layout: of all models.
        name: of the study.
        left_out: numbers of the checkpoints that are not measured.
    """
    identities = {checkpoint.model: IDENTITY for checkpoint in planned}
    write_plan(directory, name=name, identities=identities, checkpoints=planned, config={})
    for number, checkpoint in enumerate(planned):
        of_model = [one for one in planned if one.model == checkpoint.model]
        progress = of_model.index(checkpoint) / max(len(of_model) - 1, 1)
        if number not in left_out:
            keep(directory, checkpoint, some_report(layout or layout_of(), tasks, progress, seed=number))
    return directory


def in_steps(n: int, model: str = "m") -> list[CheckpointId]:
    return [CheckpointId.named(model, f"step{1000 * i}-tokens{500 * i}B") for i in range(1, n + 1)]


if __name__ == "__main__":
    models, checkpoints, tasks, layers, experts = map(int, sys.argv[2:] or (1, 25, 6, 16, 64))
    make_up_study(
        Path(sys.argv[1]),
        [one for model in range(models) for one in in_steps(checkpoints, f"OLMoE-1B-7B-0924{'-' * model}")],
        [f"task {number}" for number in range(tasks)],
        layout=layout_of(layers, experts),
    )

"""All pictures of a probe; imported where they are drawn, as it needs matplotlib and pillow."""

from __future__ import annotations

import numpy as np

from mui_callback.pictures.heatmap import expert_heatmap
from mui_callback.pictures.histogram import expert_mui_histogram
from mui_callback.pictures.palette import EXPERT_COLORS
from mui_callback.pictures.scene import MOST_PANELS, Picture, Scene
from mui_callback.pictures.style import as_png, shortened
from mui_callback.pictures.top_experts import activated_experts, top_experts_bars
from mui_callback.pictures.trajectories import trajectories
from mui_callback.task_report import TaskReport

_ALL = "all tasks pooled"


def draw(scene: Scene) -> dict[str, Picture]:
    """Every picture by the last part of its key; see `PICTURES`."""
    task = scene.pooled
    name = next(iter(scene.tasks))
    whose, briefly = (f"task {name}", f"task {shortened(name, 380, 9.5)}") if len(scene.tasks) == 1 else [_ALL] * 2
    at = f"step {scene.step:,}"
    subtitle = f"{briefly} ({task.n_samples:,} samples), {at}"
    top = activated_experts(task)
    drawn = {
        "expert_mui": (
            expert_heatmap(
                task, task.expert_mui, title="Expert MUI: share of its neurons that are key", subtitle=subtitle
            ),
            f"Expert MUI by layer and expert: {_summary(task)}",
        ),
        "activated_frequency": (
            expert_heatmap(
                task,
                task.activated_frequency,
                title="Activated frequency: share of the samples in which it owns a key neuron",
                subtitle=subtitle,
            ),
            "Activated frequency by layer and expert: the share of the samples in which it owns a key neuron; "
            f"{int(task.key_experts.sum()):,} of {task.layout.n_experts:,} are key experts "
            f"(at least {100 * task.key_expert_frequency:g} %)",
        ),
        "top_experts": (
            top_experts_bars(
                task,
                title="The most frequently activated experts",
                subtitle=f"{subtitle}: {len(top)} of {int((task.activated > 0).sum()):,} that own a key neuron",
            ),
            _top(task, len(top)),
        ),
        "trajectory": (
            trajectories(scene.paths, title="MUI against performance", subtitle=f"each task up to {at}"),
            _paths(scene),
        ),
        "expert_mui_histogram": (
            expert_mui_histogram(task, title="How expert MUI is spread", subtitle=subtitle),
            f"Experts by expert MUI, {_kinds(task)}: {_summary(task)}",
        ),
    }
    return {
        name: Picture(as_png(figure), f"{caption}. Step {scene.step:,}, {whose} ({task.n_samples:,} samples).")
        for name, (figure, caption) in drawn.items()
    }


def _summary(task: TaskReport) -> str:
    if not task.is_measured:
        return "nothing was measured"
    values = task.expert_mui
    top = int(np.argmax(values))
    most = f"most in {task.layout.expert_labels[top]}, {100 * values[top]:.3g} %"
    return (
        f"mean {100 * float(values.mean()):.3g} %, {most}; "
        f"{int((values == 0).sum()):,} of {len(values):,} experts have no key neuron"
    )


def _top(task: TaskReport, n: int) -> str:
    n_shared = task.shared_in_top10
    shared = "" if n_shared is None else f"; {n_shared} of them shared"
    words = f"The {n} experts" if n > 1 else "The expert" if n else "None"
    return f"{words} with the highest activated frequency, with expert MUI inside{shared}"


def _kinds(task: TaskReport) -> str:
    present = [kind for kind in EXPERT_COLORS if kind in task.layout.expert_kinds]
    return " and ".join(present)


def _paths(scene: Scene) -> str:
    phases = ", ".join(f"{path.task or 'all tasks'} ({path.points[-1].phase.value})" for path in scene.paths)
    left_out = len(scene.paths) - MOST_PANELS
    more = f"; {left_out} tasks more are not shown" if left_out > 0 else ""
    n = max((len(path.points) for path in scene.paths), default=0)
    probes = f"{n} probe{'' if n == 1 else 's'}"
    return f"MUI against performance, {probes} up to the ring, of {phases or 'no task has both'}{more}"

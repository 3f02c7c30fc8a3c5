"""Every expert at every checkpoint: one figure, whose cells are exchanged by a slider."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO

import numpy as np
from markupsafe import Markup
from PIL import Image

from mui_callback.html_report.album import Album, Drawn
from mui_callback.html_report.measured import Measured
from mui_callback.html_report.progress import Progress
from mui_callback.html_report.routes import POOLED
from mui_callback.metrics.utilization import FloatArray
from mui_callback.pictures.expert_blocks import ExpertBlock, expert_blocks
from mui_callback.pictures.heatmap import cell_colors, expert_heatmap
from mui_callback.task_report import TaskReport

VALUES = {
    "expert_mui": "Expert MUI: share of its neurons that are key",
    "activated_frequency": "Activated frequency: share of the samples in which it owns a key neuron",
}
_MOST_BYTES = 5_000_000
"""Of the cells of all models; tasks are left out that would take more."""
_IMAGE = re.compile(r'<image xlink:href="[^"]*"')


@dataclass(frozen=True)
class Slides:
    """All heatmaps of a model."""

    drawn: Drawn
    """The figure with the cells of the last checkpoint."""
    checkpoints: tuple[str, ...]
    tasks: tuple[str, ...]
    values: Mapping[str, str]
    cells: dict[str, list[list[list[str]]]]
    """By value: of each task, each checkpoint and each kind of expert, a picture."""
    left_out: tuple[str, ...]
    """Tasks for which there is no room."""


def slides_of(album: Album, model: str, found: Sequence[Measured], progress: Progress, n_models: int) -> Slides:
    """Draw them, and keep expert MUI of all tasks pooled at each checkpoint, and both values at the last one.

    Args:
        album: where figures go.
        model: whose experts these are.
        found: its checkpoints; those whose experts are others than those of the last one are left out.
        progress: what they are counted in.
        n_models: that share the room.

    Raises:
        OSError: a file cannot be written.
    """
    layout = found[-1].pooled.layout
    found = [one for one in found if one.pooled.layout == layout]
    together = POOLED if len(found[-1].tasks) > 1 else next(iter(found[-1].tasks), POOLED)
    for one in found:
        for value, title in list(VALUES.items())[: None if one is found[-1] else 1]:
            where = f"{model}, {together} ({one.pooled.n_samples:,} samples), {progress.phrase(one.x)}"
            figure = expert_heatmap(one.pooled, getattr(one.pooled, value), title=title, subtitle=where)
            album.keep(f"{value}-{model}-{one.checkpoint.label}", figure)
    last = found[-1].pooled
    figure = expert_heatmap(
        last, last.expert_mui, title="All experts", subtitle=f"{model}: a row for each layer", is_numbered=False
    )
    alt = f"Expert MUI of all {layout.n_experts:,} experts of {model} by layer, {together}, checkpoint by checkpoint"
    drawn = album.add(f"experts-{model}", figure, alt)
    cells: dict[str, list[list[list[str]]]] = {value: [] for value in VALUES}
    tasks: list[str] = []
    size = 0
    candidates: list[tuple[str, list[TaskReport | None]]] = [(together, [one.pooled for one in found])]
    if len(found[-1].tasks) > 1:
        candidates += [(task, [one.tasks.get(task) for one in found]) for task in found[-1].tasks]
    for task, reports in candidates:
        made = {value: [_cells(report, value, last) for report in reports] for value in VALUES}
        size += sum(len(image) for of_value in made.values() for images in of_value for image in images)
        if tasks and size > _MOST_BYTES / n_models:
            break
        tasks.append(task)
        for value, images in made.items():
            cells[value].append(images)
    return Slides(
        drawn=_with_cells(drawn, cells["expert_mui"][0][-1]),
        checkpoints=tuple(f"{progress.phrase(one.x)} ({one.checkpoint.label})" for one in found),
        tasks=tuple(tasks),
        values={value: title.partition(":")[0] for value, title in VALUES.items()},
        cells=cells,
        left_out=tuple(task for task, _ in candidates[len(tasks) :]),
    )


def _cells(report: TaskReport | None, value: str, like: TaskReport) -> list[str]:
    """A picture of each kind of expert; of nothing, where nothing was measured."""
    is_measured = report is not None and report.is_measured
    values: FloatArray = getattr(report, value) if is_measured else np.full(like.layout.n_experts, np.nan)
    return [_as_data(block) for block in expert_blocks(like.layout, 100 * values)]


def _as_data(block: ExpertBlock) -> str:
    """A pixel for each cell, as a data URL; what is no value shows the page through, on light and on dark ground."""
    pixels, palette = cell_colors(block.values)
    image = Image.fromarray(pixels)
    image.putpalette(palette[:, :3].tobytes())
    buffer = BytesIO()
    image.save(buffer, format="png", optimize=True, transparency=palette[:, 3].tobytes())
    return f"data:image/png;base64,{b64encode(buffer.getvalue()).decode()}"


def _with_cells(drawn: Drawn, images: Sequence[str]) -> Drawn:
    """With other pictures of the cells, which the script of the page finds by their class; the last picture of the
    figure is the bar of colours."""
    remaining = iter(images)
    svg = _IMAGE.sub(lambda _: f'<image class="cells" href="{next(remaining)}"', drawn.svg, count=len(images))
    return replace(drawn, svg=Markup(svg))

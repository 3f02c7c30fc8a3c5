"""The picture of a run: how loss, accuracy and MUI moved, and where in the model each task's key neurons are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from mui_callback.layout import ExpertLayout
from mui_callback.metrics.utilization import FloatArray
from mui_callback.pictures.palette import colors_of
from mui_callback.pictures.style import open_axes
from mui_callback.report import MUIReport
from mui_callback.sinks.base import ProbePoint
from mui_callback.task_report import TaskReport

_MARKERS = ("o", "s", "^")


def save_picture(points: Sequence[ProbePoint], path: Path, title: str = "") -> Path:
    """Draw the probes of one run as PNG.

    Args:
        points: Probes in the order of the steps; failed ones are left out.
        path: The file; its directory must be there.
        title: Line above the picture.

    Raises:
        ValueError: No probe has a report.
    """
    measured = [(point.step, point.report) for point in points if point.report is not None]
    if not measured:
        raise ValueError("save_picture: expected one or more points with a report")
    steps = [step for step, _ in measured]
    reports = [report for _, report in measured]
    figure = Figure(figsize=(15, 9), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08, wspace=0.04))
    figure.suptitle(title, fontsize=15)
    parts = figure.add_gridspec(2, 1, height_ratios=(1.25, 1))
    _draw_curves(figure.add_subfigure(parts[0]), steps, reports)
    _draw_experts(figure.add_subfigure(parts[1]), reports[-1], steps[-1])
    figure.savefig(path, dpi=120)
    return path


def expert_grid(layout: ExpertLayout, values_E: FloatArray) -> FloatArray:
    """Values of experts as ``[layers, columns]``: the routed experts, an empty column, the shared experts.

    Where a layer has fewer experts than another it has empty cells, which are NaN.
    """
    n_routed = max(layer.n_routed for layer in layout.layers)
    n_shared = max(len(layer.shared_widths) for layer in layout.layers)
    grid = np.full((len(layout.layers), n_routed + (1 + n_shared if n_shared else 0)), np.nan)
    for position, layer in enumerate(layout.layers):
        values = values_E[layout.layer_of_expert == position]
        grid[position, : layer.n_routed] = values[: layer.n_routed]
        if layer.shared_widths:
            grid[position, n_routed + 1 : n_routed + 1 + len(layer.shared_widths)] = values[layer.n_routed :]
    return grid


def _draw_curves(figure: Any, steps: list[int], reports: list[MUIReport]) -> None:
    loss, accuracy, mui = figure.subplots(1, 3)
    _draw_metric(loss, steps, reports, lambda task: task.loss)
    loss.set(title="Held-out loss", ylabel="nats per byte")
    _draw_metric(accuracy, steps, reports, lambda task: task.token_accuracy, scale=100)
    _draw_metric(
        accuracy, steps, reports, lambda task: task.choice_accuracy, scale=100, linestyle="--", suffix=": choice"
    )
    accuracy.set(title="Held-out accuracy", ylabel="% of bytes (dashed: % of choices)")
    _draw_metric(mui, steps, reports, lambda task: task.mui, scale=100)
    mui.set(title="MUI: expert neurons that are key", ylabel="% of the neurons of all experts")
    for axes in (loss, accuracy, mui):
        axes.set_xlabel("optimizer steps")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.02)
        open_axes(axes)
    accuracy.set_ylim(0, 103)
    figure.legend(handles=accuracy.get_lines(), loc="outside upper center", ncols=9, frameon=False, fontsize=12)


def _draw_metric(
    axes: Any,
    steps: list[int],
    reports: list[MUIReport],
    metric: Callable[[TaskReport], float | None],
    *,
    scale: float = 1,
    linestyle: str = "-",
    suffix: str = "",
) -> None:
    for (task, color), marker in zip(colors_of(reports[0].task_names).items(), _MARKERS * 9, strict=False):
        values = [metric(report.tasks[task]) for report in reports]
        if all(value is None for value in values):
            continue
        scaled = [np.nan if value is None else scale * value for value in values]
        axes.plot(
            steps, scaled, linestyle, color=color, marker=marker, markersize=4.5, linewidth=1.8, label=f"{task}{suffix}"
        )


def _draw_experts(figure: Any, report: MUIReport, step: int) -> None:
    layout = report.layout
    grids = {task: 100 * expert_grid(layout, task_report.expert_mui) for task, task_report in report.tasks.items()}
    highest = max(float(np.nanmax(grid)) for grid in grids.values())
    panels = figure.subplots(1, len(grids), sharey=True, squeeze=False)[0]
    for axes, (task, grid), color in zip(panels, grids.items(), colors_of(list(grids)).values(), strict=False):
        image = axes.pcolormesh(grid, cmap="cividis", vmin=0, vmax=highest or 1, edgecolors="white", linewidth=0.8)
        axes.set_title(task, color=color, fontweight="bold")
        _label_experts(axes, layout, grid.shape[1])
    panels[0].set_ylabel("layer")
    panels[0].invert_yaxis()
    panels[0].set_yticks(np.arange(len(layout.layers)) + 0.5, [str(layer.layer) for layer in layout.layers])
    figure.colorbar(image, ax=panels, label="% of the expert's neurons", pad=0.01, aspect=12)
    figure.suptitle(f"Expert MUI after step {step}: key neurons of each expert", fontsize=12)


def _label_experts(axes: Any, layout: ExpertLayout, n_columns: int) -> None:
    n_routed = max(layer.n_routed for layer in layout.layers)
    labels = {column: f"E{column}" for column in range(0, n_routed, max(1, n_routed // 8))}
    labels |= {column: f"S{column - n_routed}" for column in range(n_routed + 1, n_columns)}
    axes.set_xticks([column + 0.5 for column in labels], list(labels.values()))
    axes.set_xlabel("routed experts (E) and shared experts (S)" if n_columns > n_routed else "routed experts")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)

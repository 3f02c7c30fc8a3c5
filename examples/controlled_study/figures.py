"""The pictures of a study: how the variants came along, in which phases, and what they miss without some neurons."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from mui_callback.metrics.phases import Phase
from mui_callback.pictures.palette import EXPERT_COLORS, PHASE_COLORS, PHASE_MARKERS, colors_of
from mui_callback.pictures.style import DPI, FAINT, RULE, as_png, open_axes

from .comparison import Mean, mean
from .results import Results
from .variants import VARIANTS, Variant

_OF_TRAJECTORIES = (
    ("loss", 1, "Held-out loss", "nats per byte"),
    ("mui", 100, "MUI", "% of all expert neurons"),
    ("key_expert_proportion", 100, "Key experts", "% of all experts"),
    ("shared_share", 100, "Key neurons in shared experts", "% (dotted: of all neurons)"),
    ("expert_diversity", 100, "Effective experts of key neurons", "% of all experts"),
    ("routing_rank_correlation", 1, "Routing and use of routed experts", "rank correlation"),
)
_MASKS = {
    "neurons": {"key": "key neurons", "random": "as many random ones"},
    "one expert a layer": {
        "shared": "the shared expert",
        "most activated": "the most activated routed expert",
        "most routed to": "the one most routed to",
        "random": "a random routed expert",
    },
}


def save_all(results: Results, output: Path) -> list[Path]:
    """Draw ``trajectories.png``, ``causal.png`` and ``phases.png``."""
    drawn = {"trajectories": _trajectories, "causal": _causal, "phases": _phases}
    for name, draw in drawn.items():
        (output / f"{name}.png").write_bytes(as_png(draw(results)))
    return [output / f"{name}.png" for name in drawn]


def _trajectories(results: Results) -> Figure:
    figure = _page(11, 6.4)
    panels = figure.subplots(2, 3, sharex=True)
    for axes, (column, factor, title, unit) in zip(panels.flat, _OF_TRAJECTORIES, strict=True):
        for variant, style in _styles():
            _draw_mean(axes, results, column, factor, variant, style)
            if column == "shared_share" and variant.has_shared:
                axes.axhline(factor / variant.n_experts, color=style["color"], linestyle=":", linewidth=1)
        axes.set_title(title, fontsize=11)
        axes.set_ylabel(unit)
        if column == "loss":
            axes.set_yscale("log")
            axes.set_yticks([1, 2, 4, 6], ["1", "2", "4", "6"])
            axes.minorticks_off()
        elif column != "routing_rank_correlation":
            axes.set_ylim(bottom=0)
        open_axes(axes)
    for axes in panels[-1]:
        axes.set_xlabel("optimizer steps")
    handles = [Line2D([], [], label=variant.name, **style) for variant, style in _styles()]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    return figure


def _draw_mean(
    axes: Any, results: Results, column: str, factor: float, variant: Variant, style: dict[str, Any]
) -> None:
    means: dict[int, Mean] = {}
    for step in results.steps:
        if found := results.of(column, variant, step):
            means[step] = mean([factor * value for value in found.values()])
    if not means:
        return
    steps = list(means)
    axes.plot(steps, [one.value for one in means.values()], **style)
    low, high = [one.low for one in means.values()], [one.high for one in means.values()]
    axes.fill_between(steps, low, high, color=style["color"], alpha=0.13, linewidth=0)


def _causal(results: Results) -> Figure:
    figure = _page(11, 6.6)
    parts: Any = figure.subfigures(len(_MASKS), 1)
    for part, (what, masks) in zip(parts, _MASKS.items(), strict=True):
        panels = part.subplots(1, len(results.tasks), squeeze=False)[0]
        colors = colors_of(masks)
        for axes, task in zip(panels, results.tasks, strict=True):
            for place, (masked, label) in enumerate(masks.items()):
                shift = 0.8 * (place + 0.5) / len(masks) - 0.4
                _draw_changes(axes, results, what, masked, task, shift, color=colors[masked], label=label)
            axes.axhline(0, color=FAINT, linewidth=0.8)
            for border in range(1, len(VARIANTS)):
                axes.axvline(border - 0.5, color=RULE, linewidth=0.8)
            axes.set_xlim(-0.5, len(VARIANTS) - 0.5)
            axes.set_title(task, fontsize=11)
            axes.set_xticks(
                range(len(VARIANTS)), [variant.name.replace(", ", "\n") for variant in VARIANTS], fontsize=9
            )
            axes.tick_params(axis="x", length=0)
            open_axes(axes)
            axes.grid(visible=False, axis="x")
        panels[0].set_ylabel("change of held-out loss,\nnats per byte")
        part.suptitle("Without " + ("key neurons" if what == "neurons" else "one expert of each layer"), fontsize=12)
        part.legend(handles=panels[-1].containers, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _draw_changes(
    axes: Any, results: Results, what: str, masked: str, task: str, shift: float, *, color: str, label: str
) -> None:
    """The mean over seeds and its interval, and each seed."""
    means: dict[float, Mean] = {}
    for place, variant in enumerate(VARIANTS):
        if found := list(results.change(what, masked, variant, task).values()):
            means[place + shift] = mean(found)
            axes.plot(np.full(len(found), place + shift), found, ".", color=color, alpha=0.35, markersize=4, zorder=1)
    reach = np.nan_to_num([one.reach for one in means.values()])
    values = [one.value for one in means.values()]
    axes.errorbar(list(means), values, reach, fmt="o", color=color, label=label, markersize=5, capsize=3)


def _phases(results: Results) -> Figure:
    figure = _page(11, 7.2)
    panels = figure.subplots(len(results.tasks), len(VARIANTS), sharex="row", sharey="row", squeeze=False)
    seeds = sorted({row["seed"] for row in results.rows})
    for row, task in zip(panels, results.tasks, strict=True):
        for axes, variant in zip(row, VARIANTS, strict=True):
            for seed in seeds:
                path = results.path(variant, seed, task)
                x, y = ([one["performance"] for one in path], [100 * one["mui"] for one in path])
                axes.plot(x, y, color=RULE, linewidth=0.8, zorder=1)
                for phase in Phase:
                    of = [place for place, one in enumerate(path) if one["phase"] == phase.value]
                    axes.plot(
                        [x[place] for place in of],
                        [y[place] for place in of],
                        PHASE_MARKERS[phase],
                        color=PHASE_COLORS[phase],
                        markersize=2.5 if phase is Phase.UNDECIDED else 5,
                        markeredgewidth=0,
                    )
            open_axes(axes)
        row[0].set_ylabel(f"{task}\nMUI, %")
        is_choice = task == "arithmetic"
        for axes in row:
            axes.set_xlabel("right choices" if is_choice else "negative loss", fontsize=9, labelpad=2)
    for axes, variant in zip(panels[0], VARIANTS, strict=True):
        axes.set_title(variant.name, fontsize=11)
    handles = [
        Line2D([], [], linestyle="", marker=PHASE_MARKERS[phase], color=PHASE_COLORS[phase], label=phase.value)
        for phase in Phase
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=5, frameon=False)
    return figure


def _page(width: float, height: float) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06, wspace=0.03, hspace=0.03)
    return Figure(figsize=(width, height), dpi=DPI, layout=layout, facecolor="white")


def _styles() -> Iterator[tuple[Variant, dict[str, Any]]]:
    """Colour says whether an expert is shared, the line how many there are."""
    for variant in VARIANTS:
        color = EXPERT_COLORS["shared" if variant.has_shared else "routed"]
        yield variant, {"color": color, "linestyle": "--" if variant.n_experts == 8 else "-", "linewidth": 1.8}

"""The experts that a task activates most, with how much of each is key: a figure of arXiv 2509.23933."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mui_callback.pictures import style
from mui_callback.pictures.palette import EXPERT_COLORS
from mui_callback.task_report import TaskReport

_ROW, _LEFT, _WIDTH, _RIGHT, _BOTTOM, _TOP = 34, 92, 520, 150, 66, 92


def top_experts_bars(task: TaskReport, *, title: str, subtitle: str, n: int = 10) -> Figure:
    """A bar of the activated frequency of each of the n most frequently activated experts, the most frequent one above,
    and inside of it one of its expert MUI; shared experts in a colour of their own.

    Args:
        task: whose experts these are.
        title: above it.
        subtitle: below that.
        n: experts at most.
    """
    top = task.top_experts(n) if task.is_measured else []
    height = max(len(top), 3) * _ROW
    figure = style.blank(_LEFT + _WIDTH + _RIGHT, height + _BOTTOM + _TOP, title, subtitle)
    axes = style.open_axes(style.place(figure, _LEFT, _BOTTOM, _WIDTH, height))
    labels, frequencies, muis = zip(*top, strict=True) if top else ((), (), ())
    places = range(len(top))
    kind_of = dict(zip(task.layout.expert_labels, task.layout.expert_kinds, strict=True))
    colors = [EXPERT_COLORS[kind_of[label]] for label in labels]
    frequent = [100 * value for value in frequencies]
    axes.barh(places, frequent, height=0.74, color=colors, alpha=0.3, linewidth=0, label="frequency")
    axes.barh(places, [100 * value for value in muis], height=0.36, color=colors, linewidth=0, label="mui")
    for place, frequency, mui in zip(places, frequencies, muis, strict=True):
        words = f"{100 * frequency:.0f} %,  MUI {100 * mui:.3g} %"
        axes.text(100 * frequency + 1, place, words, fontsize=9.5, color=style.INK, va="center")
    axes.set(xlim=(0, 100), ylim=(max(len(top), 3) - 0.5, -0.5))
    axes.set_xticks(range(0, 101, 20), [str(percent) for percent in range(0, 101, 20)])
    axes.set_yticks(places, labels)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0, labelsize=10.5)
    style.label(axes, x="% of the samples (wide), % of the expert's neurons (narrow)")
    if not top:
        axes.text(50, 1, "nothing was measured", fontsize=10, color=style.INK, ha="center", va="center")
    kinds = {kind: color for kind, color in EXPERT_COLORS.items() if color in colors}
    names = {"routed": "routed expert", "shared": "shared expert", "dense": "dense MLP"} if len(kinds) > 1 else {}
    figure.legend(
        handles=[
            Patch(color="#3a3f47", alpha=0.3, linewidth=0, label="activated frequency"),
            Patch(color="#3a3f47", linewidth=0, label="expert MUI"),
            *(Patch(color=kinds[kind], linewidth=0, label=name) for kind, name in names.items() if kind in kinds),
        ],
        loc="upper left",
        bbox_to_anchor=(10 / (_LEFT + _WIDTH + _RIGHT), 1 - 52 / (height + _BOTTOM + _TOP)),
        ncols=5,
        frameon=False,
        fontsize=9.5,
        labelcolor=style.INK,
    )
    return figure

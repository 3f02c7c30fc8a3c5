"""The experts that a task activates most, with how much of each is key: a figure of arXiv 2509.23933."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mui_callback.layout import ExpertKind
from mui_callback.pictures import style
from mui_callback.pictures.palette import EXPERT_COLORS
from mui_callback.task_report import TaskReport

_ROW, _LEFT, _WIDTH, _RIGHT, _BOTTOM, _TOP, _LEGEND = 34, 92, 520, 150, 66, 68, 24
_NAMES: dict[ExpertKind, str] = {"routed": "routed expert", "shared": "shared expert", "dense": "dense MLP"}


def activated_experts(task: TaskReport, n: int = 10) -> list[tuple[str, float, float]]:
    """Those of `TaskReport.top_experts` that own a key neuron of any sample."""
    return [top for top in task.top_experts(n) if top[1] > 0]


def top_experts_bars(task: TaskReport, *, title: str, subtitle: str, n: int = 10) -> Figure:
    """A bar of the activated frequency of each of the n most frequently activated experts, the most frequent one above,
    and inside of it one of its expert MUI; shared experts in a colour of their own.

    Args:
        task: whose experts these are.
        title: above it.
        subtitle: below that.
        n: experts at most.
    """
    top = activated_experts(task, n)
    height = max(len(top), 3) * _ROW
    kind_of = dict(zip(task.layout.expert_labels, task.layout.expert_kinds, strict=True))
    kinds = [kind for kind in _NAMES if any(kind_of[label] == kind for label, *_ in top)]
    page = height + _BOTTOM + _TOP + _LEGEND * (len(kinds) > 1)
    figure = style.blank(_LEFT + _WIDTH + _RIGHT, page, title, subtitle)
    axes = style.open_axes(style.place(figure, _LEFT, _BOTTOM, _WIDTH, height))
    labels, frequencies, muis = zip(*top, strict=True) if top else ((), (), ())
    places = range(len(top))
    colors = [EXPERT_COLORS[kind_of[label]] for label in labels]
    frequent = [100 * value for value in frequencies]
    axes.barh(places, frequent, height=0.74, color=colors, alpha=0.3, linewidth=0, label="frequency")
    axes.barh(places, [100 * value for value in muis], height=0.36, color=colors, linewidth=0, label="mui")
    for place, frequency, mui in zip(places, frequencies, muis, strict=True):
        words = f"{100 * frequency:.0f} %,  MUI {100 * mui:.3g} %"
        axes.text(100 * max(frequency, mui) + 1, place, words, fontsize=9.5, color=style.INK, va="center")
    axes.set(xlim=(0, 100), ylim=(max(len(top), 3) - 0.5, -0.5))
    axes.set_xticks(range(0, 101, 20), [str(percent) for percent in range(0, 101, 20)])
    axes.set_yticks(places, labels)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0, labelsize=10.5)
    style.label(axes, x="wide: activated frequency, % of the samples;  narrow: expert MUI, % of its neurons")
    if not top:
        words = "no expert owns a key neuron" if task.is_measured else "nothing was measured"
        axes.text(50, 1, words, fontsize=10, color=style.INK, ha="center", va="center")
    if len(kinds) > 1:
        handles = [Patch(color=EXPERT_COLORS[kind], linewidth=0, label=_NAMES[kind]) for kind in kinds]
        options = {"ncols": len(kinds), "frameon": False, "fontsize": 9.5, "labelcolor": style.INK, "borderaxespad": 0}
        corner = 10 / figure.bbox.width, 1 - 58 / page
        figure.legend(handles=handles, loc="upper left", bbox_to_anchor=corner, **options)
    return figure

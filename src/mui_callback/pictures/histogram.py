"""How expert MUI is spread over the experts of each kind."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from mui_callback.pictures import style
from mui_callback.pictures.palette import EXPERT_COLORS
from mui_callback.task_report import TaskReport

_BINS = 30


def expert_mui_histogram(task: TaskReport, *, title: str, subtitle: str) -> Figure:
    """The share of the experts of each kind by their expert MUI; experts without a key neuron have a bar of their own,
    left of 0.

    Args:
        task: whose experts these are.
        title: above it.
        subtitle: below that.
    """
    values, kinds = 100 * task.expert_mui, np.array(task.layout.expert_kinds)
    shown = [kind for kind in EXPERT_COLORS if task.is_measured and (kinds == kind).any()]
    figure = style.blank(780, 440 if len(shown) > 2 else 420, title, subtitle)
    axes = style.open_axes(style.place(figure, 64, 62, 690, 268))
    style.label(axes, x="expert MUI: % of the expert's neurons that are key", y="% of the experts of a kind")
    highest = float(values.max()) or 1.0
    edges = np.linspace(0, highest, _BINS + 1)
    width = edges[1]
    for place, kind in enumerate(shown):
        color, of_kind = EXPERT_COLORS[kind], values[kinds == kind]
        above = 100 * np.histogram(of_kind[of_kind > 0], edges)[0] / len(of_kind)
        above[above == 0] = np.nan  # no outline
        none = 100 * float(np.mean(of_kind == 0))
        mean = f"{kind}: {len(of_kind):,} experts, mean {of_kind.mean():.3g} %"
        axes.stairs(above, edges, color=color, fill=True, alpha=0.3, linewidth=0)
        axes.stairs(above, edges, color=color, linewidth=1.6, label=mean)
        if none:
            left = (place - len(shown) - 1) * width  # side by side
            axes.bar(left, none, width, align="edge", color=to_rgba(color, 0.3), edgecolor=color, linewidth=1.6)
    if shown:
        options = {"frameon": False, "fontsize": 9.5, "labelcolor": style.INK, "borderaxespad": 0.2}
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, **options)
    else:
        axes.text(0.5, 0.5, "nothing was measured", transform=axes.transAxes, fontsize=10, ha="center", color=style.INK)
    axes.set_ylim(bottom=0)
    ticks = [tick for tick in axes.get_xticks() if 0 < tick <= highest * (1 + 1e-9)]
    axes.set_xticks([-(1 + len(shown) / 2) * width, *ticks], ["none", *(f"{tick:.4g}" for tick in ticks)])
    axes.set_xlim(-(len(shown) + 2) * width, highest + width)
    return figure

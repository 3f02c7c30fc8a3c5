"""One frame of the view: what is known of a run, as wide and as high as the terminal."""

from __future__ import annotations

from typing import Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mui_callback.metrics.phases import Phase
from mui_callback.watch.sparkline import sparkline
from mui_callback.watch.watched_run import WatchedRun

_STYLES = {
    Phase.EVOLVING: "green",
    Phase.ACCUMULATING: "cyan",
    Phase.UNDECIDED: "dim",
    Phase.COARSENING: "yellow",
    Phase.COLLAPSING: "bold red",
}
_BY_CODE = {phase.code: phase for phase in Phase}
_WITH_TREND = {"MUI %": ("mui", "cyan"), "loss": ("loss", "magenta")}
ALL_TASKS = "all tasks"
_LABEL_WIDTH = 9
_OTHER_ROWS = 16
"""Lines of a frame besides those of the tasks."""


def frame(run: WatchedRun, *, now: float, width: int, height: int | None, unread: int = 0) -> RenderableType:
    """The frame.

    Args:
        run: what is shown.
        now: seconds since the epoch.
        width: columns of the terminal.
        height: its rows; tasks that have no room are counted only. None: as many as are needed.
        unread: lines of the record that cannot be read.
    """
    parts: list[RenderableType] = [*_heading(run, now)]
    if run.points:
        parts += [Text(""), _tasks(run, width, height), Text(""), _rest(run, width)]
    else:
        parts.append(Text("No probe has succeeded yet.", style="yellow"))
    parts += [_line(text, style) for text, style in _troubles(run, unread)]
    return Group(*parts)


def _line(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _heading(run: WatchedRun, now: float) -> list[Text]:
    title = _line("")
    title.append(f"step {max(run.points):,}" if run.points else "no point yet", style="bold")
    facts = [f"{len(run.points)} point{'' if len(run.points) == 1 else 's'}"]
    if run.last_time is not None:
        facts.append(f"the last {_ago(now - run.last_time)} ago")
    facts.append(f"run {run.id}" + (f", {run.place} of {run.n_runs} in the record" if run.n_runs > 1 else ""))
    if run.n_parts > 1:
        facts.append(f"started {run.n_parts} times")
    title.append(f" · {' · '.join(facts)}")
    layers = run.probed["layers"]
    shared = sum(len(layer["shared_widths"]) for layer in layers)
    experts = shared + sum(layer["n_routed"] for layer in layers)
    neurons = sum(layer["n_routed"] * layer["routed_width"] + sum(layer["shared_widths"]) for layer in layers)
    rules = ", ".join(run.probed["settings"]["rules"])
    model = f"{len(layers)} layers, {experts:,} experts ({shared:,} shared), {neurons:,} neurons · {rules}"
    return [title, _line(model, "dim")]


def _tasks(run: WatchedRun, width: int, height: int | None) -> Table:
    is_wide, is_narrow = width >= 110, width < 72
    gap = 2 if is_wide else 1
    columns = {"MUI %": 5, "phase": 12, "loss": 6, "acc %": 5, "key %": 5, "shared %": 8}
    if is_narrow:
        del columns["key %"], columns["shared %"]
    longest = max(map(len, (ALL_TASKS, *run.task_names)))
    name_width = min(longest, 30 if is_wide else 11)
    trend = min(40, max(3, (width - name_width - sum(columns.values()) - gap * (len(columns) + 2)) // 2))
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("task", no_wrap=True, overflow="ellipsis", max_width=name_width)
    for name, column_width in columns.items():
        side: Literal["left", "right"] = "left" if name == "phase" else "right"
        table.add_column(name, justify=side, no_wrap=True, min_width=column_width)
        if name in _WITH_TREND:
            table.add_column("", no_wrap=True, min_width=3)
    names = run.task_names
    room = len(names) if height is None else max(1, height - _OTHER_ROWS)
    shown = names if len(names) <= room else names[: max(1, room - 1)]
    for task in (None, *shown):
        cells = {
            "MUI %": Text(_percent(run.last("mui", task), 2), style="bold"),
            "phase": _phase(run.last("phase", task)),
            "loss": Text(_number(run.last("loss", task))),
            "acc %": Text(_percent(run.accuracy(task))),
            "key %": Text(_percent(run.last("key_expert_proportion", task))),
            "shared %": Text(_percent(run.last("shared_share", task))),
        }
        row = [Text(ALL_TASKS, style="bold") if task is None else Text(task)]
        for name in columns:
            row.append(cells[name])
            if name in _WITH_TREND:
                metric, style = _WITH_TREND[name]
                row.append(Text(sparkline(run.series(metric, task), trend), style=style))
        table.add_row(*row)
    if len(shown) < len(names):
        table.add_row(Text(f"… {len(names) - len(shown)} more", style="dim"))
    return table


def _rest(run: WatchedRun, width: int) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis", max_width=width - _LABEL_WIDTH)
    trend = 5 if width < 110 else 20

    def known(label: str, metric: str, as_percent: bool, digits: int = 0) -> str:
        value = run.last(metric)
        shown = f"{_percent(value, digits)} %" if as_percent else _number(value)
        return "" if value is None else f"{label} {shown} {sparkline(run.series(metric), trend)}"

    rows = {
        "Experts": [
            known("Gini", "expert_gini", False),
            known("effective", "effective_experts", False),
            known("key expert MUI", "key_expert_mui", True, 1),
        ],
        "Shared": [
            known("of contributions", "shared_mass_share", True),
            known("over a fair share", "shared_fair_ratio", False),
        ],
        "Routing": [
            known("dead", "dead_experts", True, 1),
            known("busiest / mean", "load_max_ratio", False),
            known("entropy", "router_entropy", False),
        ],
        "Top": [
            f"{top['expert']} {_percent(top['activated_frequency'])} %"
            for top in run.top_experts
            if top.get("activated_frequency") is not None
        ],
        "Bench": [f"{name} {_number(score)}" for name, score in run.benchmarks().items()],
        "Cost": [
            "" if run.spent.last_probe is None else f"a probe {run.spent.last_probe:.2g} s",
            known("overhead", "overhead", True, 1),
            f"{_ago(run.spent.training)} of training",
        ],
    }
    for name, cells in rows.items():
        if any(cells):
            table.add_row(name, Text(_as_fits(list(filter(None, cells)), width - _LABEL_WIDTH)))
    return table


def _as_fits(cells: list[str], width: int) -> str:
    """As many cells as there is room for whole; at least the first one."""
    line, *others = cells
    for cell in others:
        if len(line) + 2 + len(cell) > width:
            break
        line += f"  {cell}"
    return line


def _troubles(run: WatchedRun, unread: int) -> list[tuple[str, str]]:
    lines = []
    if run.troubles:
        step, what = run.troubles[-1]
        count = f", {len(run.troubles)} errors in all" if len(run.troubles) > 1 else ""
        lines.append((f"Last error (step {step:,}{count}): {what}", "red"))
    if run.alerts:
        step, what = run.alerts[-1]
        count = f", {len(run.alerts)} alerts in all" if len(run.alerts) > 1 else ""
        lines.append((f"Last alert (step {step:,}{count}): {what}", "yellow"))
    if unread:
        lines.append((f"{unread} line{'s' if unread > 1 else ''} of the record cannot be read.", "yellow"))
    return lines


def _phase(code: float | None) -> Text:
    if code is None:
        return Text("-")
    phase = _BY_CODE[round(code)]
    return Text(phase.value, style=_STYLES[phase])


def _percent(share: float | None, digits: int = 0) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _ago(seconds: float) -> str:
    seconds = max(0.0, seconds)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"

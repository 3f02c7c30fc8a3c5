"""One frame of the view: what is known of a run, as wide and as high as the terminal."""

from __future__ import annotations

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
    facts = [f"{len(run.points)} points"]
    if run.last_time is not None:
        facts.append(f"the last {_ago(now - run.last_time)} ago")
    facts.append(f"run {run.id}" + (f", {run.place} of {run.n_runs} in the record" if run.n_runs > 1 else ""))
    if run.n_parts > 1:
        facts.append(f"resumed {run.n_parts - 1}×")
    title.append(f" · {' · '.join(facts)}")
    layers = run.probed["layers"]
    shared = sum(len(layer["shared_widths"]) for layer in layers)
    experts = shared + sum(layer["n_routed"] for layer in layers)
    neurons = sum(layer["n_routed"] * layer["routed_width"] + sum(layer["shared_widths"]) for layer in layers)
    rules = ", ".join(run.probed["settings"]["rules"])
    model = f"{len(layers)} layers, {experts:,} experts ({shared:,} shared), {neurons:,} neurons · {rules}"
    return [title, _line(model, "dim")]


def _tasks(run: WatchedRun, width: int, height: int | None) -> Table:
    trend = max(6, min(40, (width - 56) // 2))
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    table.add_column("task", no_wrap=True, overflow="ellipsis", max_width=max(10, width - 56 - 2 * trend + 10))
    for name in ("MUI %", ""):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    table.add_column("phase", no_wrap=True)
    table.add_column("loss", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name in ("acc %", "key %", "shared %"):
        table.add_column(name, justify="right", no_wrap=True)
    names = run.task_names
    room = len(names) if height is None else max(1, height - _OTHER_ROWS)
    shown = names if len(names) <= room else names[: max(1, room - 1)]
    for task in (None, *shown):
        accuracy = run.last("choice_accuracy", task)
        accuracy = run.last("token_accuracy", task) if accuracy is None else accuracy
        table.add_row(
            Text("all tasks", style="bold") if task is None else Text(task),
            Text(_percent(run.last("mui", task), 2), style="bold"),
            Text(sparkline(run.series("mui", task), trend), style="cyan"),
            _phase(run.last("phase", task)),
            _number(run.last("loss", task)),
            Text(sparkline(run.series("loss", task), trend), style="magenta"),
            _percent(accuracy),
            _percent(run.last("key_expert_proportion", task)),
            _percent(run.last("shared_share", task)),
        )
    if len(shown) < len(names):
        table.add_row(Text(f"… {len(names) - len(shown)} more", style="dim"))
    return table


def _rest(run: WatchedRun, width: int) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis", max_width=width - 11)
    trend = 6 if width < 110 else 20

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
            known("against a fair share ×", "shared_fair_ratio", False),
        ],
        "Routing": [
            known("dead", "dead_experts", True, 1),
            known("busiest ×", "load_max_ratio", False),
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
            table.add_row(name, Text("  ".join(filter(None, cells))))
    return table


def _troubles(run: WatchedRun, unread: int) -> list[tuple[str, str]]:
    lines = []
    if run.troubles:
        step, what = run.troubles[-1]
        count = f", {len(run.troubles)} errors in all" if len(run.troubles) > 1 else ""
        lines.append((f"Last error (step {step:,}{count}): {what}", "red"))
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

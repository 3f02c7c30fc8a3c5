"""What a study found, in words: of each model and task the phase, where it came from and where it turned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mui_callback.html_report.numbers import NONE, percent, performance
from mui_callback.html_report.routes import MEAN, Route
from mui_callback.metrics.phases import Phase

_MEANS = {
    Phase.EVOLVING: "it gets better and needs fewer of its neurons for it",
    Phase.ACCUMULATING: "it gets better and needs more of its neurons for it",
    Phase.COARSENING: "it gets worse and needs more of its neurons",
    Phase.COLLAPSING: "it gets worse and needs fewer of its neurons",
}


@dataclass(frozen=True)
class SummaryLine:
    """One model and task, for the table."""

    model: str
    task: str
    phase: str
    why: str
    """Why the phase is undecided; else empty."""
    performance: tuple[str, str]
    """First and last."""
    mui: tuple[str, str]
    turns: str


def sentences(model: str, routes: Sequence[Route], where: str) -> list[str]:
    """The answer for one model, at most three sentences.

    Args:
        model: its name.
        routes: of it.
        where: its last checkpoint.
    """
    if not routes:
        return [f"{model} has no checkpoint with both performance and MUI."]
    main = next((route for route in routes if route.name == MEAN), routes[0])
    points, phase = main.path.points, main.path.points[-1].phase
    of = main.name if main.is_task else f"the {main.name}" if main.name == MEAN else main.name
    if len(points) == 1:
        return [
            f"At {where}, the only checkpoint, {model} has a performance ({_axis_words(main.path.axis)}) of "
            f"{performance(points[0].performance, main.path.axis)} and an MUI of {percent(points[0].mui)} on {of}."
        ]
    lines = []
    if phase is Phase.UNDECIDED:
        reason = _why(main)
        lines.append(f"At {where}, {model} is in no phase that can be called on {of}{f': {reason}' if reason else ''}.")
    else:
        lines.append(f"At {where}, {model} is {phase.value} on {of}: {_MEANS[phase]}.")
    others = "no phase" if phase is Phase.UNDECIDED else "no other phase"
    turns = _turns(main) or f"{others} was called on the way"
    lines.append(
        f"From {_at(main, 0)} to {_at(main, -1)}, performance ({_axis_words(main.path.axis)}) went from "
        f"{performance(points[0].performance, main.path.axis)} to "
        f"{performance(points[-1].performance, main.path.axis)} and MUI from {percent(points[0].mui)} to "
        f"{percent(points[-1].mui)}; {turns}."
    )
    tasks = [route for route in routes if route.is_task]
    if len(tasks) > 1:
        counts = Counter(route.path.points[-1].phase for route in tasks)
        words = [
            f"{counts[phase]} {'is' if counts[phase] == 1 else 'are'} {phase.value}" for phase in Phase if counts[phase]
        ]
        lines.append(f"Of the {len(tasks)} tasks, {_listed(words)}.")
    return lines


def summary_lines(routes: Sequence[Route]) -> list[SummaryLine]:
    """A line for each route of a model."""
    return [
        SummaryLine(
            model=route.model,
            task=route.name,
            phase=route.path.points[-1].phase.value,
            why=_why(route),
            performance=(
                performance(route.path.points[0].performance, route.path.axis),
                performance(route.path.points[-1].performance, route.path.axis),
            ),
            mui=(percent(route.path.points[0].mui), percent(route.path.points[-1].mui)),
            turns=_turns(route) or NONE,
        )
        for route in routes
    ]


def _why(route: Route) -> str:
    last = route.phases[-1]
    return (last.call.reason or "") if last is not None else "no point"


def _turns(route: Route) -> str:
    """In words; empty if there are none."""
    decided = [(point, point.phase) for point in route.path.points if point.phase is not Phase.UNDECIDED]
    if not route.turns:
        if not decided or route.path.points[-1].phase is decided[0][1]:
            return ""
        return f"{decided[0][1].value} was called, last at {_named(route, decided[-1][0].name)}"
    words = [
        f"{before.value} turned into {after.value} at {_named(route, point.name)}"
        for point, before, after in route.turns
    ]
    shown = words[-3:]
    return _listed([words[0], *shown] if len(words) > 3 and words[0] not in shown else shown)


def _named(route: Route, name: str) -> str:
    counted = route.path.counted
    return f"{name} tokens" if counted[0] == "tokens" else f"{counted[0]} {name}"


def _at(route: Route, index: int) -> str:
    return _named(route, route.path.points[index].name)


def _axis_words(axis: str) -> str:
    name = axis.removeprefix("-").replace("_", " ")
    return f"{name}, lower is better" if axis.startswith("-") else name


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"

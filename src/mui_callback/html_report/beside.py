"""The paper's numbers beside those of a study, where the study has something of the same name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mui_callback.html_report import published
from mui_callback.html_report.measured import Measured
from mui_callback.html_report.numbers import NONE, percent, performance
from mui_callback.html_report.routes import MEAN, Route
from mui_callback.pictures.paths import PathPoint
from mui_callback.trajectory.checkpoint import in_tokens

_VARIANT = r"(?:[-_ ]?(?:base|chat|instruct|thinking|hf|bf16|fp8|\d{4}))*"
_OLMOE = "OLMoE-1B-7B"
_TOLERANCE = 0.1
"""How far from the paper's a number of tokens may be, relative."""
_MATH = re.compile(r"(?:^|[^a-z])math(?:$|[^a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Comparison:
    """Some of the paper's numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str
    is_matched: bool
    """Whether this study has any of them."""


def comparisons(found: Mapping[str, Sequence[Measured]], routes: Sequence[Route]) -> tuple[Comparison, ...]:
    """All that the paper has of this kind, those with a match first.

    Args:
        found: checkpoints by model.
        routes: of all models.
    """
    made = (
        _olmoe(found, routes, MEAN, published.OLMOE_MEAN, "mean over benchmarks", "accumulating to 2T, then evolving"),
        _olmoe(found, routes, "mbpp", published.OLMOE_MBPP, "MBPP", "accumulating throughout"),
        _models(found, routes),
        _key_experts(found),
    )
    return tuple(sorted(made, key=lambda one: not one.is_matched))


def is_same_model(name: str, of_paper: str) -> bool:
    """Whether a name, such as that of a repository or a directory, is that of a model of the paper, tuned or not."""
    words = re.escape(of_paper).replace(r"\-", "[-_ ]?")
    return re.fullmatch(words + _VARIANT, name.rstrip("/").rpartition("/")[2], re.IGNORECASE) is not None


def _olmoe(
    found: Mapping[str, Sequence[Measured]],
    routes: Sequence[Route],
    task: str,
    numbers: Sequence[published.AtTokens],
    whose: str,
    phases: str,
) -> Comparison:
    own = next(
        (route for route in routes if route.name.lower() == task and is_same_model(route.model, _OLMOE)),
        None,
    )
    rows = []
    for at in numbers:
        near = _nearest(found[own.model], own, at.tokens) if own is not None else None
        rows.append((in_tokens(at.tokens), f"{at.performance} %", f"{at.mui} %", *_own(own, near)))
    return Comparison(
        f"{published.OLMOE}, {whose}",
        ("tokens", "performance, paper", "MUI, paper", "here: tokens", "performance, here", "MUI, here"),
        tuple(rows),
        f"The paper calls it {phases}. Here: the checkpoint within 10 % of as many tokens.",
        any(row[3] != NONE for row in rows),
    )


def _nearest(found: Sequence[Measured], route: Route, tokens: float) -> tuple[float, PathPoint] | None:
    points = {point.name: point for point in route.path.points}
    known = [
        (one.checkpoint.tokens, points[name])
        for one, name in zip(found, _names(found, route), strict=True)
        if one.checkpoint.tokens is not None and name in points
    ]
    near = [(own, point) for own, point in known if abs(own - tokens) <= _TOLERANCE * tokens]
    return min(near, key=lambda one: abs(one[0] - tokens), default=None)


def _names(found: Sequence[Measured], route: Route) -> list[str]:
    """What the points of a route are called, where they are counted in tokens; nothing else is compared."""
    is_in_tokens = route.path.counted[0] == "tokens"
    return [in_tokens(one.x) if is_in_tokens else "" for one in found]


def _own(route: Route | None, near: tuple[float, PathPoint] | None) -> tuple[str, str, str]:
    if route is None or near is None:
        return (NONE, NONE, NONE)
    tokens, point = near
    return (in_tokens(tokens), performance(point.performance, route.path.axis), percent(point.mui))


def _models(found: Mapping[str, Sequence[Measured]], routes: Sequence[Route]) -> Comparison:
    rows = []
    for name, of_paper in published.MODELS.items():
        model = next((model for model in found if is_same_model(model, name)), None)
        of_model = [route for route in routes if route.model == model]
        own = next((route for route in of_model if route.name == MEAN), of_model[0] if of_model else None)
        point = None if own is None else own.path.points[-1]
        here = (NONE, NONE, NONE) if own is None or point is None else (
            f"{own.model}, {own.name}", performance(point.performance, own.path.axis), percent(point.mui),
        )  # fmt: skip
        rows.append((name, f"{of_paper.performance} %", f"{of_paper.mui} %", *here))
    return Comparison(
        "Models, mean over the paper's benchmarks",
        ("model", "performance, paper", "MUI, paper", "here", "performance, here", "MUI, here"),
        tuple(rows),
        "Here: the last checkpoint of the model with this name.",
        any(row[3] != NONE for row in rows),
    )


def _key_experts(found: Mapping[str, Sequence[Measured]]) -> Comparison:
    rows = []
    of_math = {
        model: next((report for task, report in of_model[-1].tasks.items() if _MATH.search(task)), None)
        for model, of_model in found.items()
    }
    for name, share in published.KEY_EXPERTS_ON_MATH.items():
        model = next((model for model in found if is_same_model(model, name)), None)
        own = of_math.get(model) if model is not None else None
        rows.append((name, f"{share:.2f} %", NONE if own is None else percent(own.key_expert_proportion, 4)))
    others = [
        (f"{model} (not in the paper)", NONE, percent(report.key_expert_proportion, 4))
        for model, report in of_math.items()
        if report is not None and not any(is_same_model(model, name) for name in published.KEY_EXPERTS_ON_MATH)
    ]
    return Comparison(
        "Key expert proportion on MATH",
        ("model", "paper", "here"),
        (*rows, *others),
        "Here: the last checkpoint, on the task called math.",
        bool(others) or any(row[2] != NONE for row in rows),
    )

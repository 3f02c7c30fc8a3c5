"""When something in a run is worth an alert: a pure function of the points so far.

Each situation is told when it begins, and again only after it has ended.

- A task *enters coarsening or collapsing*: the phase at the last point is one of them, and the last one that was called
  before it is another (that a phase is undecided in between ends nothing).
- *Dead experts appear*, which were alive: their share is `dead` above the lowest so far, where that of the first point
  counts as a fifth more, since a router that has learned nothing leaves nobody out, and does not fall. Nothing is told
  before the sixth point: a router that begins to learn leaves many experts alone for a while. It ends half-way back.
- *Concentration jumps*: `expert_gini` is further from the mean of the last `window` points (at least 5) than `jump`
  and than Student's prediction interval at `level` allows for the next value of a normal sample with their spread. A
  trend that goes on is no jump: what it adds to the spread makes the interval as much wider. After a jump its own size
  is in the spread, so that the new level is not told again.
- *Overhead over budget*, with ``every="auto"``: `overhead` has been more than `over` times the budget at three points,
  without falling by a tenth from the first of them to the last (it starts high in any run, where little is trained
  yet); it ends at the budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from mui_callback.metrics.catalogue import OVERHEAD, PREFIX, key
from mui_callback.metrics.phases import Phase
from mui_callback.metrics.rarefaction import t_quantile
from mui_callback.sinks.base import Alert

Scalars = Mapping[str, float]
_DEAD = key("dead_experts")
_FEWEST = 5
"""Points before a jump, or dead experts, can be told."""
_UNLEARNED = 0.2
"""More dead experts than at the first point, which are expected where a router has learned."""
_OVER_FOR = 3
"""Points that the overhead is looked at for."""


@dataclass(frozen=True)
class AlertRule:
    """What it takes; the module's text says what each is of.

    Raises:
        ValueError: a value is out of its range.
        TypeError: one that has to be a whole number is not.
    """

    dead: float = 0.02
    """Share of the routed experts."""
    window: int = 10
    """Points, at least 5."""
    level: float = 0.999
    """In (0, 1)."""
    jump: float = 0.02
    """Of a Gini coefficient."""
    over: float = 1.5
    """Times the budget, at least 1."""
    per_hour: int = 6
    """Alerts at most, of all kinds; more are only logged."""

    def __post_init__(self) -> None:
        for name in ("window", "per_hour"):
            if not isinstance(getattr(self, name), int):
                raise TypeError(f"{name}: expected a whole number, got {getattr(self, name)!r}")
        ranges = {
            "dead": (0 <= self.dead <= 1, "a share in [0, 1]"),
            "window": (self.window >= _FEWEST, f"a number of points of at least {_FEWEST}"),
            "level": (0 < self.level < 1, "a number in (0, 1)"),
            "jump": (self.jump >= 0, "a number of at least 0"),
            "over": (self.over >= 1, "a number of at least 1"),
            "per_hour": (self.per_hour >= 0, "a number of alerts of at least 0"),
        }
        for name, (is_right, expected) in ranges.items():
            if not is_right:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")


def alerts_at(step: int, points: Mapping[int, Scalars], budget: float | None, rule: AlertRule) -> tuple[Alert, ...]:
    """What begins at a point, one alert for each kind.

    Args:
        step: of the point; later ones are not looked at.
        points: the logged scalars by step.
        budget: of the run, time in probes as share of the time in training; None where the interval was named instead.
        rule: what it takes.
    """
    steps = [at for at in sorted(points) if at <= step]
    so_far = [points[at] for at in steps]
    if step not in points:
        return ()
    found = (
        _phase(step, so_far, Phase.COLLAPSING, "performance and MUI both fall"),
        _phase(step, so_far, Phase.COARSENING, "performance falls while MUI rises"),
        _dead_experts(step, {at: points[at][_DEAD] for at in steps if _DEAD in points[at]}, rule),
        _jump(step, _values(so_far, key("expert_gini")), rule),
        None if budget is None else _overhead(step, _values(so_far, OVERHEAD), budget, rule),
    )
    return tuple(alert for alert in found if alert is not None)


def _phase(step: int, points: Sequence[Scalars], phase: Phase, what: str) -> Alert | None:
    entered = []
    for name, code in points[-1].items():
        if code == phase.code and name.startswith(f"{PREFIX}/") and name.endswith("/phase"):
            called = [point[name] for point in points if point.get(name, Phase.UNDECIDED.code) != Phase.UNDECIDED.code]
            if len(called) < 2 or called[-2] != code:
                entered.append(name.removeprefix(f"{PREFIX}/").removesuffix("phase").rstrip("/") or "all tasks pooled")
    if not entered:
        return None
    return Alert(phase.value, step, f"MUI: {phase.value}", f"{', '.join(entered)}: {what} at step {step}.", is_bad=True)


def _dead_experts(step: int, share_at: Mapping[int, float], rule: AlertRule) -> Alert | None:
    was = is_on = False
    shares = list(share_at.values())
    lowest = accumulate([*(share + _UNLEARNED for share in shares[:1]), *shares[1:]], min)
    for number, ((before, share), low) in enumerate(zip(pairwise(shares), lowest, strict=False), start=1):
        begins = number >= _FEWEST and share > low + rule.dead and share >= before
        was, is_on = is_on, share > low + rule.dead / 2 if is_on else begins
    if was or not is_on:
        return None
    fewest = min(list(share_at)[:-1], key=lambda at: share_at[at])
    text = (
        f"{shares[-1]:.1%} of the routed experts get no token of the probe set at step {step}; at the fewest it was "
        f"{share_at[fewest]:.1%} (step {fewest})."
    )
    return Alert("dead_experts", step, "MUI: dead experts", text)


def _jump(step: int, values: Sequence[float], rule: AlertRule) -> Alert | None:
    *before, now = values[-rule.window - 1 :] or [0.0]
    n = len(before)
    if n < _FEWEST:
        return None
    mean, spread = float(np.mean(before)), float(np.std(before, ddof=1))
    allowed = spread * (1 + 1 / n) ** 0.5 * t_quantile(n - 1, rule.level)
    if abs(now - mean) <= max(allowed, rule.jump):
        return None
    text = (
        f"The Gini coefficient of key neurons over experts is {now:.3f} at step {step}; over the {n} points before it "
        f"was {mean:.3f} ± {spread:.3f}."
    )
    return Alert("concentration", step, "MUI: expert concentration jumps", text)


def _overhead(step: int, shares: Sequence[float], budget: float, rule: AlertRule) -> Alert | None:
    was = is_on = False
    for end in range(_OVER_FOR, len(shares) + 1):
        last = shares[end - _OVER_FOR : end]
        begins = min(last) > rule.over * budget and last[-1] > 0.9 * last[0]
        was, is_on = is_on, last[-1] > budget if is_on else begins
    if was or not is_on:
        return None
    text = f"Probes take {shares[-1]:.1%} of the training time at step {step}; the budget is {budget:.1%}."
    return Alert("overhead", step, "MUI: probes cost more than their budget", text)


def _values(points: Sequence[Scalars], name: str) -> list[float]:
    return [point[name] for point in points if name in point]

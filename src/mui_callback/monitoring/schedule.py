"""When to probe: a pure function of the step, and of what it has cost so far."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, log10
from operator import index
from typing import Any, Literal

from mui_callback.spent import Spent

Every = int | Literal["auto"] | None

_WARMUP_END = 512
"""Powers of two below this many steps are probed where there is no fixed interval that they could run up to."""
_FIRST_LOOK = 10
"""Steps after which training is first asked how fast it is."""
_POINTS = 200
"""Points that are made until every step has a probe whose cost is nothing, and again for each e-fold of the steps."""
_FIRST_PROBE = 100
"""Step of the first probe at a pace of its own where none was made before, so that nobody knows what one costs."""


@dataclass(frozen=True)
class Schedule:
    """At which optimizer steps to probe; whatever is asked for, a step is probed once.

    Raises:
        ValueError: a value is out of its range.
    """

    every: Every = "auto"
    """Optimizer steps between probes; ``"auto"`` for as many as `budget` allows; None for no regular probes."""
    budget: float = 0.01
    """With ``every="auto"``: time spent in probes, as share of the time spent in training. Probes that are asked for
    in other ways, and benchmarks, are made anyway and paid from it."""
    at: Iterable[int] = ()
    """Steps to probe besides."""
    warmup: bool = False
    """Also after 1, 2, 4, 8, … steps, up to `every` (up to 256 without a fixed interval)."""
    at_start: bool = True
    """Also before the first step."""
    at_end: bool = True
    """Also after the last step."""
    on_evaluation: bool = False
    """Also whenever the trainer evaluates, so that its metrics have a point beside them."""

    def __post_init__(self) -> None:
        if self.every not in ("auto", None):
            every = _step(self.every, least=1)
            if every is None:
                raise ValueError(
                    f"every: expected a positive number of optimizer steps, 'auto' or None, got {self.every!r}"
                )
            object.__setattr__(self, "every", every)
        if not isinstance(self.budget, int | float) or not 0 < self.budget < 1:
            raise ValueError(f"budget: expected a share of the training time, between 0 and 1, got {self.budget!r}")
        steps = [_step(step, least=0) for step in self.at] if isinstance(self.at, Iterable) else [None]
        if isinstance(self.at, str) or None in steps:
            raise ValueError(f"at: expected a collection of step numbers, got {self.at!r}")
        object.__setattr__(self, "at", frozenset(steps))

    @property
    def is_auto(self) -> bool:
        """Whether the pace follows from the cost."""
        return self.every == "auto"

    def is_due(self, step: int, *, previous: int | None = None, evaluated: bool = False, last: bool = False) -> bool:
        """Whether a probe is asked for after this many optimizer steps, the ones of ``every="auto"`` apart.

        Args:
            step: optimizer steps done.
            previous: the same when it was asked before; by default one less. What was due in between is due now.
            evaluated: whether the trainer has just evaluated.
            last: whether training ends here.
        """
        if step == 0:
            return self.at_start or 0 in self.at
        done = range((step - 1 if previous is None else previous) + 1, step + 1)
        return (
            (isinstance(self.every, int) and any(s % self.every == 0 for s in done))
            or (self.warmup and any(s & (s - 1) == 0 and s < self._warmup_end for s in done))
            or any(s in self.at for s in done)
            or (last and self.at_end)
            or (evaluated and self.on_evaluation)
        )

    def affords(self, spent: Spent) -> bool:
        """Whether one more probe, and one at the end if there is to be one, stay within the budget."""
        return self.budget * spent.training >= spent.probing + self._next_cost(spent)

    def next_look(self, step: int, spent: Spent) -> int:
        """The next step at which ``every="auto"`` looks whether a probe is due.

        It is a multiple of a round number (1, 2 or 5 times a power of ten), so that points of different runs meet, and
        about 0.5 % of the steps done away or more, so that a cheap probe does not fill the tracker.

        Args:
            step: optimizer steps done.
            spent: what they and the probes took.
        """
        if spent.last_probe is None:
            return _after(step, _FIRST_PROBE)
        if spent.steps < _FIRST_LOOK or spent.training <= 0:
            return _after(step, _FIRST_LOOK)
        allowed_per_step = self.budget * spent.training / spent.steps
        interval = _round_number(max(spent.last_probe / allowed_per_step, step / _POINTS))
        missing = spent.probing + self._next_cost(spent) - self.budget * spent.training
        wait = max(ceil(missing / allowed_per_step), 1)
        return _after(step + wait - 1, interval)

    def _next_cost(self, spent: Spent) -> float:
        return (spent.last_probe or 0.0) * (2 if self.at_end else 1)

    @property
    def _warmup_end(self) -> int:
        return self.every if isinstance(self.every, int) else _WARMUP_END


def _after(step: int, interval: int) -> int:
    """The first multiple of an interval after a step."""
    return (step // interval + 1) * interval


def _round_number(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, … that is not less."""
    if least <= 1:
        return 1
    power: int = 10 ** int(log10(least))
    return next(digit * power for digit in (1, 2, 5, 10, 20) if digit * power >= least)


def _step(value: Any, *, least: int) -> int | None:
    """A whole number of whatever kind; None for anything else."""
    try:
        step = index(value)
    except TypeError:
        return None
    return None if isinstance(value, bool) or step < least else step

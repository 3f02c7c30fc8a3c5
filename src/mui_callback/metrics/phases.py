"""The phase of training: whether performance and MUI rise or fall over the last points, or neither can be said.

The four directions are those of MUI-Eval (arXiv 2504.07440): performance up and MUI down is evolving, both up
accumulating, performance down and MUI up coarsening, both down collapsing. The papers compare two numbers; here is a
rule that says when they differ.

The rule. Over the last `window` points each axis is fitted by a line against the step (ordinary least squares). Its
slope Σ c_p · value_p, with c_p = (x_p - x̄) / Σ (x - x̄)², has two sources of error, taken for independent:

(a) Which samples are in the probe. They are the same at every point, so what a sample adds to the slope is
    ψ_i = Σ c_p · influence_i(p), and the variance is n / (n - 1) · Σ ψ²: what a sample adds at all points alike
    cancels. A score from elsewhere has a standard error at each point instead, with variance Σ c_p² · se_p².
(b) What training itself does from point to point: the residual variance of the line over Σ (x - x̄)².

The variance of the slope is their sum, and its interval is Student's with the degrees of freedom of Welch and
Satterthwaite (n - 1 for a, unlimited for scores, window - 2 for b). An axis has a direction if its interval leaves out
0; a phase is called if both axes have one.

What the level means: 1 - level is the rate, for each point that is looked at, of calling a direction for an axis that
does not change, for all samples that could have been drawn. A phase is called at most as often where one axis does not
change, and far less often where neither does. Welch and Satterthwaite is an approximation: at level 0.95 the rate is
5 % where one source has most of the variance, and in between at most 6.5 % with 5 points, 5.5 % with 8 and 13 % with 3
(simulated). Noise of single samples that is new at every point is in both (a) and (b), and the rate lower for it.

What is assumed: samples are independent; a change inside the window is a line (one that curves adds to the residuals,
and is called less often); the noise of training is normal and independent from point to point. Noise that lasts from
one point to the next looks like a trend: with an autocorrelation of 0.5, and nothing else, the 5 % become 13 % with 5
points and 19 % with 8. Each look is another chance to be wrong, and windows that overlap are wrong together: at 95 %
some wrong calls are to be expected in a run of a hundred points.

Shapes: W points of the window, N samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

import numpy as np

from mui_callback.metrics.rarefaction import t_quantile
from mui_callback.metrics.resampling import Estimate
from mui_callback.metrics.utilization import FloatArray


class Phase(Enum):
    """Where training goes (arXiv 2504.07440)."""

    EVOLVING = "evolving"
    """Performance up, MUI down."""
    ACCUMULATING = "accumulating"
    """Performance up, MUI up."""
    UNDECIDED = "undecided"
    """One of them has no clear direction."""
    COARSENING = "coarsening"
    """Performance down, MUI up."""
    COLLAPSING = "collapsing"
    """Performance down, MUI down."""

    @property
    def code(self) -> int:
        """For plots: 2, 1, 0, -1 and -2, in the order above."""
        return 2 - list(Phase).index(self)


_PHASES = {
    (1, -1): Phase.EVOLVING,
    (1, 1): Phase.ACCUMULATING,
    (-1, 1): Phase.COARSENING,
    (-1, -1): Phase.COLLAPSING,
}
"""By the directions of performance and of MUI."""
EXACT_SAMPLES = 10**9
"""Samples of a score: what it says of its standard error is taken for exact."""


@dataclass(frozen=True)
class Score:
    """A value that was measured elsewhere, such as a benchmark's."""

    value: float
    standard_error: float | None = None
    """Of this value alone, independent of those at other points; None where it is not known: the spread about the line
    has to tell it."""


Point = Estimate | Score


@dataclass(frozen=True)
class PhaseRule:
    """The settings of the rule.

    Raises:
        ValueError: a value is out of its range.
    """

    window: int = 5
    """Points that a line is fitted to, at least 3."""
    level: float = 0.95
    """Of the interval of each slope, in (0, 1)."""

    def __post_init__(self) -> None:
        if not isinstance(self.window, int) or isinstance(self.window, bool) or self.window < 3:
            raise ValueError(f"window: expected a number of points of at least 3, got {self.window!r}")
        if not isinstance(self.level, int | float) or not 0 < self.level < 1:
            raise ValueError(f"level: expected a number in (0, 1), got {self.level!r}")


@dataclass(frozen=True)
class Trend:
    """The slope of one axis over the window, in its unit per step."""

    slope: float
    standard_error: float
    low: float
    """Lower end of the slope's interval."""
    high: float
    """Upper end."""

    @property
    def direction(self) -> int:
        """1 if the interval is above 0, -1 if it is below, 0 if it holds 0."""
        return int(self.low > 0) - int(self.high < 0)


@dataclass(frozen=True)
class PhaseCall:
    """What the rule says of the last points."""

    phase: Phase
    performance: Trend | None
    """None where there are too few points or samples, as is `mui`."""
    mui: Trend | None
    first_step: int | None
    """Of the points that were looked at; None if there are none."""
    last_step: int | None
    reason: str | None
    """Why it is undecided; None if it is not."""


def call_phase(
    steps: Sequence[int],
    performance: Sequence[Estimate] | Sequence[Score],
    mui: Sequence[Estimate] | Sequence[Score],
    rule: PhaseRule,
) -> PhaseCall:
    """The phase at the last point; the module's text has the rule.

    Args:
        steps: of each point, ascending.
        performance: at each point, higher is better: the negative of a loss is ``loss.over(-1)``.
        mui: at each point.
        rule: its settings.

    Raises:
        ValueError: there are different numbers of points, the steps do not ascend, a value is not finite, a standard
            error is negative, or an axis has values of both kinds or of different numbers of samples.
    """
    axes = {"performance": performance, "MUI": mui}
    _check(steps, axes)
    last = list(steps[-rule.window :])
    first_step, last_step = (last[0], last[-1]) if last else (None, None)
    if len(last) < rule.window:
        return PhaseCall(Phase.UNDECIDED, None, None, first_step, last_step, f"fewer than {rule.window} points")
    single = [name for name, points in axes.items() if _n_samples(points[-rule.window :]) < 2]
    if single:
        reason = f"fewer than two samples of {' and '.join(single)}"
        return PhaseCall(Phase.UNDECIDED, None, None, first_step, last_step, reason)
    of_performance, of_mui = (_trend(last, points[-rule.window :], rule.level) for points in axes.values())
    trends = {"performance": of_performance, "MUI": of_mui}
    phase = _PHASES.get((of_performance.direction, of_mui.direction), Phase.UNDECIDED)
    flat = [name for name, trend in trends.items() if trend.direction == 0]
    why = f"no clear change of {' and '.join(flat)}" if flat else None
    return PhaseCall(phase, of_performance, of_mui, first_step, last_step, why)


def _trend(steps: Sequence[int], points: Sequence[Point], level: float) -> Trend:
    x_W = np.array(steps, dtype=np.float64) - np.mean(steps)
    slope_W = x_W / (x_W @ x_W)
    # Relative to the first point, so that the slope of what does not change at all is exactly 0.
    value_W = np.array([point.value - points[0].value for point in points])
    slope = float(slope_W @ value_W)
    residual_W = value_W - value_W.mean() - slope * x_W
    freedom = len(x_W) - 2
    variances = _variance_of_samples(slope_W, points), float(residual_W @ residual_W / (x_W @ x_W)) / freedom
    error, half = sum(variances) ** 0.5, 0.0
    if error > 0:
        # Welch and Satterthwaite: the share of each source in the variance, over its degrees of freedom
        inverse = sum(
            (variance / sum(variances)) ** 2 / degrees
            for variance, degrees in zip(variances, (_n_samples(points) - 1, freedom), strict=True)
        )
        half = error * t_quantile(1 / inverse, level)
    return Trend(slope, error, slope - half, slope + half)


def _variance_of_samples(slope_W: FloatArray, points: Sequence[Point]) -> float:
    """Source (a)."""
    n = _n_samples(points)
    influence_WN = np.array([point.influence for point in points if isinstance(point, Estimate)])
    if len(influence_WN):
        slope_N = slope_W @ (influence_WN - influence_WN[0])
        return float(slope_N @ slope_N) * n / (n - 1)
    error_W = np.array([point.standard_error or 0.0 for point in points if isinstance(point, Score)])
    return float((slope_W * error_W) @ (slope_W * error_W))


def _n_samples(points: Sequence[Point]) -> int:
    return min(point.n_samples if isinstance(point, Estimate) else EXACT_SAMPLES for point in points)


def _check(steps: Sequence[int], axes: Mapping[str, Sequence[Point]]) -> None:
    """Raises `ValueError` for points that no line can be fitted to."""
    if len({len(steps), *map(len, axes.values())}) > 1:
        got = ", ".join(f"{len(points)} of {name}" for name, points in axes.items())
        raise ValueError(f"expected one point of each axis at each of {len(steps)} steps, got {got}")
    if any(after <= before for before, after in pairwise(steps)):
        raise ValueError(f"steps: expected ascending numbers, got {list(steps)}")
    for name, points in axes.items():
        if len({isinstance(point, Score) for point in points}) > 1:
            raise ValueError(f"{name}: expected an Estimate at every point or a Score at every point, got both")
        sizes = {len(point.influence) for point in points if isinstance(point, Estimate)}
        if len(sizes) > 1:
            raise ValueError(
                f"{name}: expected the same samples at every point, got numbers of {sorted(sizes)} samples"
            )
        for step, point in zip(steps, points, strict=True):
            error = point.standard_error or 0.0
            if not (np.isfinite(point.value) and np.isfinite(error) and error >= 0):
                raise ValueError(
                    f"{name}: expected a finite value and standard error, got {point.value} and {error} at step {step}"
                )

"""What was found, in words and numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.table import Table

from mui_callback.metrics.phases import Phase

from .comparison import Mean, in_words, mean, paired
from .results import MEAN, Results
from .variants import VARIANTS, Variant

OF_8, OF_8_SHARED, OF_16, OF_16_SHARED = VARIANTS
CONTRASTS = {
    "a shared expert, of 8": (OF_8_SHARED, OF_8),
    "a shared expert, of 16": (OF_16_SHARED, OF_16),
    "16 experts rather than 8": (OF_16, OF_8),
    "the same with a shared one": (OF_16_SHARED, OF_8_SHARED),
}
METRICS = {
    "loss": ("loss", "nats", 1),
    "MUI": ("mui", "points", 100),
    "key experts": ("key_expert_proportion", "points", 100),
    "key expert MUI": ("key_expert_mui", "points", 100),
    "effective experts": ("expert_diversity", "points", 100),
    "Gini": ("expert_gini", "", 1),
    "routing and use": ("routing_rank_correlation", "", 1),
    "shared share": ("shared_share", "points", 100),
    "over a fair share": ("shared_fair_ratio", "", 1),
    "of contributions": ("shared_mass_share", "points", 100),
    "shared on top": ("shared_on_top", "points", 100),
}
"""By title: column, unit and factor. Points are those of a percentage."""


def show(results: Results, console: Console) -> None:
    """Print it."""
    console.print(_table(results))
    console.print("means over tasks and seeds ± half of the 95 % interval over seeds (Student's)", style="dim")
    for heading, lines in (
        ("At the end, seed by seed, with 95 % confidence in each line alone:", contrasts(results)),
        ("MUI at the end, and halfway:", late_changes(results)),
        ("Shared experts at the end, and before the first step:", shared_shares(results)),
        ("Change of loss in nats without …", causal_lines(results)),
        ("Probes in each phase, of all runs and tasks:", phase_lines(results)),
    ):
        console.print("", heading, sep="\n", style="bold")
        for line in lines:
            console.print(f"  {line}", soft_wrap=True)


def contrasts(results: Results) -> Iterator[str]:
    """Each metric under each contrast."""
    for title, (column, unit, factor) in METRICS.items():
        for contrast, (first, second) in CONTRASTS.items():
            found, other = (
                _scaled(results.of(column, variant, results.steps[-1]), factor) for variant in (first, second)
            )
            if found.keys() & other.keys():
                yield f"{contrast}: {title} {in_words(paired(found, other), unit)}"


def late_changes(results: Results) -> Iterator[str]:
    """Whether MUI rises or falls in the second half of training."""
    steps = results.steps
    half = min(steps, key=lambda step: abs(step - steps[-1] / 2))
    for variant in VARIANTS:
        for task in (MEAN, *results.tasks):
            late, early = (_scaled(results.of("mui", variant, step, task), 100) for step in (steps[-1], half))
            yield f"{variant.name}, {task}: {in_words(paired(late, early), 'points')}"


def shared_shares(results: Results) -> Iterator[str]:
    """Whether shared experts carry more than the random model makes them."""
    for variant in (OF_8_SHARED, OF_16_SHARED):
        for title in ("shared share", "of contributions", "shared on top"):
            column, unit, factor = METRICS[title]
            late, early = (_scaled(results.of(column, variant, at), factor) for at in (results.steps[-1], 0))
            yield f"{variant.name}, {title}: {in_words(paired(late, early), unit)}"


def causal_lines(results: Results) -> Iterator[str]:
    """What is missed more than what, on the mean over tasks."""
    for what, first, second in (
        ("neurons", "key", "random"),
        ("experts", "key", "random"),
        ("one expert a layer", "most activated", "random"),
        ("one expert a layer", "most activated", "most routed to"),
        ("one expert a layer", "shared", "most activated"),
        ("one expert a layer", "shared", "random"),
    ):
        for variant in VARIANTS:
            found, other = (results.change(what, masked, variant) for masked in (first, second))
            if found.keys() & other.keys():
                values = " and ".join(_with_reach(mean(list(one.values())), 3) for one in (found, other))
                comparison = in_words(paired(found, other), "nats", 3)
                yield f"{what}, {first} and {second}, {variant.name}: {values}; {comparison}"


def phase_lines(results: Results) -> Iterator[str]:
    """How often each phase was called, where there were points enough."""
    for variant in VARIANTS:
        for task in results.tasks:
            called = Counter(
                row["phase"]
                for row in results.rows
                if row["variant"] == variant.name and row["task"] == task and row["has_phase"]
            )
            counts = ", ".join(f"{called[phase.value]} {phase.value}" for phase in Phase if called[phase.value])
            yield f"{variant.name}, {task}: {counts or 'too few probes'}"


def _table(results: Results) -> Table:
    """Means over tasks and seeds."""
    table = Table("at the end", *(variant.name for variant in VARIANTS), box=None, header_style="bold")
    for title, (column, unit, factor) in METRICS.items():
        cells = [_cell(results, column, factor, variant) for variant in VARIANTS]
        table.add_row(f"{title} {'%' if unit == 'points' else ''}", *cells)
    return table


def _cell(results: Results, column: str, factor: float, variant: Variant) -> str:
    found = _scaled(results.of(column, variant, results.steps[-1]), factor)
    return _with_reach(mean(list(found.values())), 1 if factor > 1 else 3) if found else "-"


def _with_reach(one: Mean, digits: int) -> str:
    return f"{one.value:.{digits}f}" + (f" ± {one.reach:.{digits}f}" if one.n > 1 else "")


def _scaled(values: Mapping[int, float], factor: float) -> dict[int, float]:
    return {seed: factor * value for seed, value in values.items()}

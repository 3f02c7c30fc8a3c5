"""The one list of everything that is logged: names, definitions, units, ranges.

The keys of `MUIReport.scalars` and the README's table are made from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from math import inf
from typing import Literal

PREFIX = "mui"
Detail = Literal["model", "layers"]
"""``"layers"``: what is logged of the whole model, and `Scope.LAYER` besides."""
Extreme = Literal["min", "max"]


class Scope(Enum):
    """What a metric is measured of, and where it goes."""

    TASK = "pooled and per task"
    """Logged once for all tasks pooled and once for each task."""
    POOLED = "pooled"
    """Logged for all tasks pooled; each task's value is in the report."""
    REPORT = "report"
    """Not logged, so that a run has no more than some 60 keys; in the report, of each task and of all pooled."""
    RULE = "further rule"
    """Logged once for each rule but the first, of all tasks pooled."""
    LAYER = "layer"
    """Logged once for each of at most `MOST_LAYERS` layers, of all tasks pooled, with ``detail="layers"``."""
    PROBE = "probe"
    """About the probe pass itself."""
    RUN = "run"
    """About the training run that is probed; not in a report."""
    PHASE = "run, pooled and per task"
    """The same, once for all tasks pooled and once for each task."""
    END = "per task, at the end"
    """The same, on request and for each task only."""

    @property
    def is_per_task(self) -> bool:
        """Whether each task has a key of its own."""
        return self in (Scope.TASK, Scope.PHASE, Scope.END)


@dataclass(frozen=True)
class Metric:
    """One row of the catalogue."""

    name: str
    """The last part of the key. The ends of an interval are ``<name>_low`` and ``<name>_high``."""
    definition: str
    unit: str
    low: float
    high: float | None
    """None: no upper bound."""
    scope: Scope
    attribute: str = ""
    """Of the report, where it is not the name."""
    summary: Extreme | None = None
    """What sums up a run besides its last value: the best, or the most alarming; None for nothing."""
    is_plotted: bool = True
    """Whether it deserves a panel where a tracker makes one for every key: not the ends of intervals, and not what
    seldom changes from probe to probe."""

    def matches(self, name: str) -> bool:
        """Whether this is a name of it; ``benchmark/<name>`` has many."""
        fixed, is_open, _ = self.name.partition("<")
        return name.startswith(fixed) and len(name) > len(fixed) if is_open else name == fixed

    @property
    def range(self) -> str:
        """The interval of possible values, such as ``[0, 1]``."""
        low = "(-∞" if self.low == -inf else f"[{self.low:g}"
        return f"{low}, ∞)" if self.high is None else f"{low}, {self.high:g}]"


CATALOGUE: tuple[Metric, ...] = (
    Metric("mui", "Key neurons, as share of all neurons of all MoE layers", "share", 0, 1, Scope.TASK),
    Metric("mui_low", "Lower end of the 95 % interval of `mui` over probe samples", "share", 0, 1, Scope.POOLED, is_plotted=False),
    Metric("mui_high", "Its upper end", "share", 0, 1, Scope.POOLED, is_plotted=False),
    Metric("by_rule/<rule>", "`mui` under each further rule, such as `by_rule/top_fraction_0.002`", "share", 0, 1, Scope.RULE),
    Metric("loss", "Negative log-likelihood of the response tokens", "nats per token", 0, None, Scope.TASK, summary="min"),
    Metric("loss_low", "Lower end of the 95 % interval of `loss` over probe samples", "nats per token", 0, None, Scope.POOLED, is_plotted=False),
    Metric("loss_high", "Its upper end", "nats per token", 0, None, Scope.POOLED, is_plotted=False),
    Metric("bits_per_byte", "The loss per UTF-8 byte of response text, where the text is known", "bits per byte", 0, None, Scope.POOLED, summary="min"),
    Metric("token_accuracy", "Response tokens that are the model's first choice", "share", 0, 1, Scope.TASK, summary="max"),
    Metric("choice_accuracy", "Samples with choices whose answer has the highest log-likelihood per byte (per token where the text is not known)", "share", 0, 1, Scope.TASK, summary="max"),
    Metric("key_expert_proportion", "Key experts (those that own a key neuron in at least η_expert = 60 % of the samples), as share of all experts", "share", 0, 1, Scope.TASK),
    Metric("key_expert_mui", "Mean share of key neurons inside a key expert", "share", 0, 1, Scope.POOLED),
    Metric("shared_share", "Key neurons that are in shared experts", "share", 0, 1, Scope.TASK),
    Metric("shared_mass_share", "Contribution mass Σ\\|f\\| that is made by shared experts", "share", 0, 1, Scope.POOLED),
    Metric("shared_fair_ratio", "`shared_share` over the shared experts' share of all neurons; 1 = no preference", "ratio", 0, None, Scope.POOLED),
    Metric("shared_in_top10", "Shared experts among the ten experts with the highest activated frequency", "experts", 0, 10, Scope.REPORT),
    Metric("expert_gini", "Gini coefficient of key neurons over experts", "1", 0, 1, Scope.POOLED),
    Metric("expert_entropy", "Entropy of key neurons over experts, over its maximum ln E", "1", 0, 1, Scope.REPORT),
    Metric("expert_diversity", "Effective experts exp(H) of key neurons, over E", "share", 0, 1, Scope.REPORT),
    Metric("effective_experts", "exp(H) of key neurons over experts", "experts", 1, None, Scope.POOLED),
    Metric("top10_share", "Key neurons that are in the ten experts with most", "share", 0, 1, Scope.REPORT),
    Metric("mass_gini", "Gini coefficient of contribution mass over experts", "1", 0, 1, Scope.POOLED),
    Metric("mass_entropy", "Entropy of contribution mass over experts, over its maximum ln E", "1", 0, 1, Scope.REPORT),
    Metric("mass_diversity", "Effective experts exp(H) of contribution mass, over E", "share", 0, 1, Scope.REPORT),
    Metric("mass_effective_experts", "exp(H) of contribution mass over experts", "experts", 1, None, Scope.REPORT),
    Metric("mass_top10_share", "Contribution mass that is made by the ten experts with most", "share", 0, 1, Scope.REPORT),
    Metric("dead_experts", "Routed experts that no response token was sent to", "share", 0, 1, Scope.POOLED, summary="max"),
    Metric("load_max_ratio", "Response tokens of the busiest routed expert of a layer over the mean of its experts, mean over layers", "ratio", 1, None, Scope.POOLED, summary="max"),
    Metric("load_variation", "Coefficient of variation of the response tokens of the routed experts of a layer, mean over layers", "1", 0, None, Scope.POOLED, summary="max"),
    Metric("router_entropy", "Entropy of where the router of a layer sends the response tokens, over its maximum ln E_r, mean over layers", "1", 0, 1, Scope.POOLED),
    Metric("routing_rank_correlation", "Spearman's rank correlation, over routed experts, between response tokens sent to the expert and samples in which it owns a key neuron", "1", -1, 1, Scope.POOLED),
    Metric("layer_mui/<layer>", "`mui` inside one layer, such as `layer_mui/L07`", "share", 0, 1, Scope.LAYER, "mui"),
    Metric("layer_shared_share/<layer>", "`shared_share` inside one layer", "share", 0, 1, Scope.LAYER, "shared_share"),
    Metric("layer_expert_gini/<layer>", "`expert_gini` inside one layer", "1", 0, 1, Scope.LAYER, "expert_gini"),
    Metric("layer_dead_experts/<layer>", "`dead_experts` inside one layer", "share", 0, 1, Scope.LAYER, "dead_experts", summary="max"),
    Metric("dropped_tokens", "Pairs of token and expert that the router's capacity in training would have dropped; the probe lets all pass", "share", 0, 1, Scope.PROBE, summary="max"),
    Metric("truncated", "Samples cut because they are longer than the context", "samples", 0, None, Scope.PROBE, summary="max", is_plotted=False),
    Metric("unscored", "Samples with no response token; they mark nothing", "samples", 0, None, Scope.PROBE, summary="max", is_plotted=False),
    Metric("not_finite", "Contributions and token losses that were NaN or infinite; such a contribution never counts", "entries", 0, None, Scope.PROBE, summary="max", is_plotted=False),
    Metric("identity_error", "How far the contributions of a layer are from adding up to its output, relative, at most over layers", "1", 0, None, Scope.PROBE, summary="max", is_plotted=False),
    Metric("seconds", "Duration of the probe pass", "s", 0, None, Scope.PROBE, summary="max", is_plotted=False),
    Metric("comm_bytes", "Sent between processes for the probe, over all of them; what the model's own forward sends is not counted", "bytes", 0, None, Scope.PROBE, is_plotted=False),
    Metric("overhead", "Time in probes since training began, everything that comes with them included, over the time outside of them", "ratio", 0, None, Scope.RUN),
    Metric("phase", "Over the last points: 2 evolving (performance up, MUI down), 1 accumulating (both up), 0 undecided, -1 coarsening (performance down, MUI up), -2 collapsing (both down)", "code", -2, 2, Scope.PHASE),
    Metric("benchmark/<name>", "A score of a benchmark on the live model, with its standard error as `<key>_stderr` where that is known", "its own", -inf, None, Scope.RUN),
    Metric("ablation/key", "Change of the task's loss without its key neurons (or experts) after the last step; `_low` and `_high` are the ends of its 95 % interval", "nats per token", -inf, None, Scope.END),
    Metric("ablation/random", "The same without as many random ones of the same layers and kinds", "nats per token", -inf, None, Scope.END),
)  # fmt: skip


def metric_named(name: str) -> Metric:
    """The row of this name.

    Raises:
        KeyError: there is none.
    """
    return {metric.name: metric for metric in CATALOGUE}[name]


def metric_of(name: str) -> Metric | None:
    """The row that a key is of; None for one that is not of the catalogue.

    Args:
        name: a key, such as ``"mui/gsm8k/loss"`` or ``"mui/benchmark/arc_easy/acc"``.
    """
    prefix, _, metric = name.partition("/")
    return (_row(metric) or _row(metric.partition("/")[2], of_task=True)) if prefix == PREFIX else None


def _row(name: str, *, of_task: bool = False) -> Metric | None:
    rows = (metric for metric in CATALOGUE if metric.scope.is_per_task or not of_task)
    return next((metric for metric in rows if metric.matches(name)), None)


def key(metric: str, task: str | None = None) -> str:
    """``mui/<metric>`` for all tasks pooled, ``mui/<task>/<metric>`` for one."""
    return f"{PREFIX}/{metric}" if task is None else f"{PREFIX}/{task}/{metric}"


OVERHEAD = key("overhead")


def rule_key(rule: str) -> str:
    """``mui/by_rule/top_fraction_0.002`` for the rule ``top_fraction=0.002``."""
    return key(f"by_rule/{rule.replace('=', '_')}")


MOST_LAYERS = 64
"""That have keys of their own; of more, so many are taken, evenly spaced, the first and the last among them."""


def layer_keys(metric: str, layers: Sequence[int]) -> dict[int, str]:
    """``mui/layer_mui/L07`` for the row ``layer_mui/<layer>``, by the position of the layer.

    Args:
        metric: the name of a row.
        layers: the number of each MoE layer in the module path; where one comes twice, as in an encoder-decoder,
            positions are their names.
    """
    names = layers if len(set(layers)) == len(layers) else range(len(layers))
    digits = len(str(max(names, default=0)))
    n_keys = min(len(names), MOST_LAYERS)
    positions = (round(i * (len(names) - 1) / max(n_keys - 1, 1)) for i in range(n_keys))
    return {position: key(metric.replace("<layer>", f"L{names[position]:0{digits}}")) for position in positions}


def markdown_table() -> str:
    """The catalogue as the table of the README."""
    rows = ["| key | what it is | unit | range |", "|---|---|---|---|"]
    for metric in CATALOGUE:
        keys = f"`{key(metric.name)}`"
        if metric.scope is Scope.END:
            keys = f"`{key(metric.name, '<task>')}`"
        elif metric.scope.is_per_task:
            keys += f", `{key(metric.name, '<task>')}`"
        elif metric.scope is Scope.REPORT:
            keys = f"`report.pooled.{metric.name}`"
        rows.append(f"| {keys} | {metric.definition} | {metric.unit} | {metric.range} |")
    return "\n".join(rows)

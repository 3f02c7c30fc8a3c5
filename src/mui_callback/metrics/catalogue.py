"""The one list of everything that is logged: names, definitions, units, ranges.

The keys of `MUIReport.scalars` and the README's table are made from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

PREFIX = "mui"


class Scope(Enum):
    """What a metric is measured of."""

    TASK = "pooled and per task"
    """Logged once for all tasks pooled and once for each task."""
    POOLED = "pooled"
    """Logged for all tasks pooled; each task's value is in the report."""
    PROBE = "probe"
    """About the probe pass itself."""
    RUN = "run"
    """About the training run that is probed; not in a report."""


@dataclass(frozen=True)
class Metric:
    """One row of the catalogue. `name` is the last part of the key and the attribute of the report, where it has it."""

    name: str
    definition: str
    unit: str
    low: float
    high: float | None
    """None: no upper bound."""
    scope: Scope

    @property
    def range(self) -> str:
        """The interval of possible values, such as ``[0, 1]``."""
        return f"[{self.low:g}, ∞)" if self.high is None else f"[{self.low:g}, {self.high:g}]"


CATALOGUE: tuple[Metric, ...] = (
    Metric("mui", "Key neurons, as share of all neurons of all MoE layers", "share", 0, 1, Scope.TASK),
    Metric("loss", "Negative log-likelihood of the response tokens", "nats per token", 0, None, Scope.TASK),
    Metric("bits_per_byte", "The same per UTF-8 byte of response text, where the text is known", "bits per byte", 0, None, Scope.POOLED),
    Metric("token_accuracy", "Response tokens that are the model's first choice", "share", 0, 1, Scope.TASK),
    Metric("choice_accuracy", "Samples with choices whose answer has the highest log-likelihood per byte (per token where the text is not known)", "share", 0, 1, Scope.TASK),
    Metric("key_expert_proportion", "Key experts (those that own a key neuron in at least η_expert = 60 % of the samples), as share of all experts", "share", 0, 1, Scope.TASK),
    Metric("key_expert_mui", "Mean share of key neurons inside a key expert", "share", 0, 1, Scope.TASK),
    Metric("shared_share", "Key neurons that are in shared experts", "share", 0, 1, Scope.TASK),
    Metric("shared_mass_share", "Contribution mass Σ\\|f\\| that is made by shared experts", "share", 0, 1, Scope.POOLED),
    Metric("shared_in_top10", "Shared experts among the ten experts with the highest activated frequency", "experts", 0, 10, Scope.POOLED),
    Metric("shared_fair_ratio", "`shared_share` over the shared experts' share of all neurons; 1 = no preference", "ratio", 0, None, Scope.POOLED),
    Metric("expert_gini", "Gini coefficient of key neurons over experts", "1", 0, 1, Scope.TASK),
    Metric("expert_entropy", "Entropy of key neurons over experts, over its maximum ln E", "1", 0, 1, Scope.POOLED),
    Metric("expert_diversity", "Effective experts exp(H) of key neurons, over E", "share", 0, 1, Scope.POOLED),
    Metric("effective_experts", "exp(H) of key neurons over experts", "experts", 1, None, Scope.POOLED),
    Metric("top10_share", "Key neurons that are in the ten experts with most", "share", 0, 1, Scope.POOLED),
    Metric("mass_gini", "Gini coefficient of contribution mass over experts", "1", 0, 1, Scope.POOLED),
    Metric("mass_entropy", "Entropy of contribution mass over experts, over its maximum ln E", "1", 0, 1, Scope.POOLED),
    Metric("mass_effective_experts", "exp(H) of contribution mass over experts", "experts", 1, None, Scope.POOLED),
    Metric("mass_top10_share", "Contribution mass that is made by the ten experts with most", "share", 0, 1, Scope.POOLED),
    Metric("dead_experts", "Routed experts that no response token was sent to", "share", 0, 1, Scope.POOLED),
    Metric("dropped_tokens", "Pairs of token and expert that the router's capacity in training would have dropped; the probe lets all pass", "share", 0, 1, Scope.PROBE),
    Metric("samples", "Samples in the probe", "samples", 0, None, Scope.PROBE),
    Metric("tokens", "Response tokens in the probe", "tokens", 0, None, Scope.PROBE),
    Metric("truncated", "Samples cut because they are longer than the context", "samples", 0, None, Scope.PROBE),
    Metric("unscored", "Samples with no response token; they mark nothing", "samples", 0, None, Scope.PROBE),
    Metric("not_finite", "Contributions and token losses that were NaN or infinite; such a contribution never counts", "entries", 0, None, Scope.PROBE),
    Metric("identity_error", "How far the contributions of a layer are from adding up to its output, relative, at most over layers", "1", 0, None, Scope.PROBE),
    Metric("seconds", "Duration of the probe pass", "s", 0, None, Scope.PROBE),
    Metric("comm_bytes", "Sent between processes for the probe, over all of them; what the model's own forward sends is not counted", "bytes", 0, None, Scope.PROBE),
    Metric("overhead", "Time in probes since training began, everything that comes with them included, over the time outside of them", "ratio", 0, None, Scope.RUN),
)  # fmt: skip


def key(metric: str, task: str | None = None) -> str:
    """``mui/<metric>`` for all tasks pooled, ``mui/<task>/<metric>`` for one."""
    return f"{PREFIX}/{metric}" if task is None else f"{PREFIX}/{task}/{metric}"


OVERHEAD = key("overhead")


def markdown_table() -> str:
    """The catalogue as the table of the README."""
    rows = ["| key | what it is | unit | range |", "|---|---|---|---|"]
    for metric in CATALOGUE:
        keys = f"`{key(metric.name)}`"
        if metric.scope is Scope.TASK:
            keys += f", `{key(metric.name, '<task>')}`"
        rows.append(f"| {keys} | {metric.definition} | {metric.unit} | {metric.range} |")
    return "\n".join(rows)

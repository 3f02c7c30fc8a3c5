"""In which section of a workspace, and on which panel of it, each logged metric of the catalogue is."""

from __future__ import annotations

from dataclasses import dataclass
from re import escape

from mui_callback.metrics.catalogue import PREFIX


@dataclass(frozen=True)
class Panel:
    """Some metrics on one chart.

    Args:
        title: what is above it.
        unit: what is beside its y axis.
        metrics: names of rows of the catalogue.
        by_task: also the values of each task, whatever tasks there are.
    """

    title: str
    unit: str
    metrics: tuple[str, ...]
    by_task: bool = False

    @property
    def regex(self) -> str:
        """Of the keys that it shows; without look-around, which W&B's server does not know."""
        task = "([^/]+/)?" if self.by_task else ""
        names = "|".join(_regex(name) for name in self.metrics)
        return f"^{PREFIX}/{task}({names})$"


_NOT_STDERR = "([^r]|[^r]r|[^e]rr|[^d]err)"
"""The last characters of a name that does not end in "derr"."""


def _regex(name: str) -> str:
    """``benchmark/<name>`` is whatever comes after the slash, but for the standard errors."""
    fixed, is_open, _ = name.partition("<")
    return f"{escape(fixed)}.*{_NOT_STDERR}" if is_open else escape(fixed)


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Trajectory": (
        Panel("MUI by task", "share of neurons", ("mui",), by_task=True),
        Panel("Probe loss by task", "nats per token", ("loss",), by_task=True),
        Panel("Benchmarks", "score", ("benchmark/<name>",)),
        Panel("Phase: 2 evolving, 1 accumulating, -1 coarsening, -2 collapsing", "code", ("phase",), by_task=True),
        Panel("Accuracy by task", "share", ("token_accuracy", "choice_accuracy"), by_task=True),
        Panel("MUI of all tasks, 95 % interval", "share of neurons", ("mui", "mui_low", "mui_high")),
        Panel("Probe loss of all tasks, 95 % interval", "nats per token", ("loss", "loss_low", "loss_high")),
        Panel("Bits per byte", "bits per byte", ("bits_per_byte",)),
        Panel("MUI under further rules", "share of neurons", ("by_rule/<rule>",)),
        Panel("MUI by layer", "share of neurons", ("layer_mui/<layer>",)),
    ),
    "Experts": (
        Panel("Key experts by task", "share of experts", ("key_expert_proportion",), by_task=True),
        Panel("MUI inside a key expert", "share of neurons", ("key_expert_mui",)),
        Panel("Concentration (Gini)", "0 even, 1 one expert", ("expert_gini", "mass_gini")),
        Panel("Effective experts", "experts", ("effective_experts",)),
        Panel("Concentration by layer (Gini)", "0 even, 1 one expert", ("layer_expert_gini/<layer>",)),
        Panel("Loss without key neurons", "nats per token", ("ablation/key", "ablation/random"), by_task=True),
    ),
    "Shared experts": (
        Panel("Key neurons in shared experts, by task", "share", ("shared_share",), by_task=True),
        Panel("Contribution of shared experts", "share of mass", ("shared_mass_share",)),
        Panel("Shared experts against a fair share", "1 = no preference", ("shared_fair_ratio",)),
        Panel("Key neurons in shared experts, by layer", "share", ("layer_shared_share/<layer>",)),
    ),
    "Routing": (
        Panel("Dead experts", "share of routed experts", ("dead_experts",)),
        Panel("Dropped tokens", "share", ("dropped_tokens",)),
        Panel("Busiest expert over the mean", "ratio", ("load_max_ratio",)),
        Panel("Variation of load", "coefficient of variation", ("load_variation",)),
        Panel("Router entropy", "of its maximum", ("router_entropy",)),
        Panel("Routed to, and used", "rank correlation", ("routing_rank_correlation",)),
        Panel("Dead experts by layer", "share of routed experts", ("layer_dead_experts/<layer>",)),
    ),
    "Cost": (
        Panel("Time in probes over the rest", "ratio", ("overhead",)),
        Panel("Duration of a probe", "s", ("seconds",)),
        Panel("Sent between processes", "bytes", ("comm_bytes",)),
        Panel("Cut, unscored, not finite", "samples, entries", ("truncated", "unscored", "not_finite")),
        Panel("Error of the identity", "relative", ("identity_error",)),
    ),
}  # fmt: skip
"""By the name of the section, in the order of the workspace."""

"""What is logged of the causal check at the end of training."""

from __future__ import annotations

from mui_callback.metrics.catalogue import key
from mui_callback.probe.ablation import AblationReport


def ablation_scalars(report: AblationReport) -> dict[str, float]:
    """The loss changes of each task and the ends of their intervals, by key; what there is no answer for is left out.

    The keys are ``mui/<task>/ablation/key`` and ``…/random``, with ``_low`` and ``_high`` for the ends.
    """
    scalars: dict[str, float] = {}
    for task, one in report.tasks.items():
        if one.changes is None:
            continue
        for name, change in (("key", one.changes.key), ("random", one.changes.random)):
            scalars[key(f"ablation/{name}", task)] = change.value
            if change.interval is not None:
                scalars[key(f"ablation/{name}_low", task)] = change.interval.low
                scalars[key(f"ablation/{name}_high", task)] = change.interval.high
    return scalars

"""The experts of a model as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping

from mui_callback.metrics.utilization import top_experts
from mui_callback.task_report import TaskReport

MOST_ROWS = 10_000
"""W&B's limit."""
MOST_TASKS = 20


def expert_rows(
    pooled: TaskReport, tasks: Mapping[str, TaskReport], most: int = MOST_ROWS
) -> tuple[list[str], list[list[str | int | float]]]:
    """A row for each expert, in the order of the model.

    Of more experts than `most`, those with the highest activated frequency are kept (of equals those with the highest
    MUI, then the first). With several tasks, the first 20 of them have two columns each.

    Args:
        pooled: all tasks together.
        tasks: each by itself.
        most: rows.

    Returns:
        The names of the columns, and the rows.
    """
    layout = pooled.layout
    kept = sorted(int(i) for i in top_experts(pooled.activated_frequency, pooled.expert_mui, most))
    of_tasks = list(tasks.items())[:MOST_TASKS] if len(tasks) > 1 else []
    columns = ["expert", "layer", "kind", "neurons", "key_neurons", "expert_mui", "activated_frequency", "tokens"]
    columns += [f"{name}/{metric}" for name, _ in of_tasks for metric in ("expert_mui", "activated_frequency")]
    values = [
        pooled.expert_mui,
        pooled.activated_frequency,
        *(of for _, task in of_tasks for of in (task.expert_mui, task.activated_frequency)),
    ]
    rows: list[list[str | int | float]] = []
    for i in kept:
        mui, frequency, *others = (float(value[i]) for value in values)
        counts = [int(layout.width[i]), int(pooled.key_neurons[i])]
        layer = layout.layers[layout.layer_of_expert[i]].layer
        tokens = int(pooled.routed[i])
        rows.append([layout.expert_labels[i], layer, layout.expert_kinds[i], *counts, mui, frequency, tokens, *others])
    return columns, rows

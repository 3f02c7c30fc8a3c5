"""Reports from counts that are made by hand, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mui_callback import MUIReport
from mui_callback.counts import KeySets, ProbeCounts
from mui_callback.layout import ExpertLayout, LayerShape
from mui_callback.sample_table import SampleTable
from mui_callback.settings import ProbeSettings

LAYOUT = ExpertLayout([LayerShape(1, "a", 3, 4), LayerShape(4, "b", 2, 4, (4, 2))])
"""Two layers: three routed experts of width 4; two of 4, and two shared of 4 and 2. 7 experts, 26 neurons."""


def key_sets(samples: Sequence[set[int]]) -> KeySets:
    neurons = [neuron for sample in samples for neuron in sorted(sample)]
    return KeySets(np.array(neurons, dtype=np.int32), np.cumsum([len(sample) for sample in samples], dtype=np.int64))


def make_report(
    samples: Sequence[set[int]],
    tasks: Sequence[int] | None = None,
    *,
    layout: ExpertLayout = LAYOUT,
    task_names: Sequence[str] = ("a", "b"),
    by_rule: dict[str, Sequence[set[int]]] | None = None,
    table: dict[str, Any] | None = None,
    **counts: Any,
) -> MUIReport:
    """A report of samples with these key neurons; `table` and `counts` replace what is made up for them.

    Every sample has 4 response tokens in 8 bytes, half of them right, a loss of 2 nats for each, and a mass of 1 in
    routed and in shared experts, as much in each of them.

    Args:
        samples: the key neurons of each sample, under the rule ``top_fraction=0.001``.
        tasks: of each sample; all are of the first task where it is None.
        layout: the numbering.
        task_names: of the tasks.
        by_rule: the same under further rules.
        table: fields of the `SampleTable`.
        counts: fields of the `ProbeCounts`.
    """
    n, n_tasks = len(samples), len(task_names)
    by_rule = by_rule or {}
    task_N = np.array(tasks if tasks is not None else [0] * n, dtype=np.int64)
    n_samples_Q1 = np.bincount(task_N, minlength=n_tasks)[:, None]
    n_alike_E = np.where(layout.is_shared, layout.is_shared.sum(), (~layout.is_shared).sum())
    of_samples = {
        "id": tuple(f"s{number}" for number in range(n)),
        "task": task_N,
        "n_tokens": np.full(n, 4),
        "n_bytes": np.full(n, 8),
        "truncated": np.zeros(n, dtype=np.bool_),
        "answer": np.full(n, -1),
        "choice_sample": np.zeros(0, dtype=np.int64),
        "choice_length": np.zeros(0, dtype=np.int64),
    }
    found = {
        "mass": n_samples_Q1 / n_alike_E,
        "routed": np.tile(4 * n_samples_Q1, layout.n_experts),
        "sample_mass": np.ones((n, 2)) * [1, layout.is_shared.any()],
        "loss": np.full(n, 8.0),
        "correct": np.full(n, 2),
        "choice_loss": np.zeros(0),
        "dropped": np.zeros(len(layout.layers), dtype=np.int64),
        "assigned": np.zeros(len(layout.layers), dtype=np.int64),
        "not_finite": np.zeros(1, dtype=np.int64),
        "identity_error": np.zeros(len(layout.layers)),
        "head_error": np.zeros(1),
    }
    return MUIReport(
        layout=layout,
        task_names=tuple(task_names),
        settings=ProbeSettings(rules=("top_fraction=0.001", *by_rule)),
        sample_table=SampleTable(**{**of_samples, **(table or {})}),
        counts=ProbeCounts(
            key_sets=tuple(key_sets(one) for one in (samples, *by_rule.values())), **{**found, **counts}
        ),
        probe_set="f" * 64,
        comm_bytes=0,
        seconds=1.0,
    )

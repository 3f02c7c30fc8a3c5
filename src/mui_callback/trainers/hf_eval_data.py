"""Probe samples from the eval data of a running `transformers.Trainer`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

from mui_callback.probe.probe_set import ProbeSet
from mui_callback.trainers.eval_rows import Collate, EvalData, own_copy, read_tasks

_MASK_COLUMNS = ("labels", "label_ids", "completion_mask", "assistant_masks")
"""Columns beside the model's own that collators make labels from."""


def eval_probe_set(trainer: Any, max_samples: int) -> ProbeSet | None:
    """The first samples of each of the Trainer's eval data sets, as one task each; None if it has none.

    Args:
        trainer: a `transformers.Trainer`.
        max_samples: samples taken of each data set.

    Raises:
        ProbeSetError: the rows cannot be probed; see `read_tasks`.
    """
    data = getattr(trainer, "eval_dataset", None)
    if data is None:
        return None
    collate = partial(_collate, trainer, own_copy(trainer.data_collator, trainer, trainer.model))
    tasks = {
        str(name): EvalData(rows, collate, f"eval_dataset {name!r}")
        for name, rows in (data if isinstance(data, dict) else {"eval": data}).items()
    }
    is_encoder_decoder = bool(getattr(getattr(trainer.model, "config", None), "is_encoder_decoder", False))
    return read_tasks(tasks, max_samples, encoder_decoder=is_encoder_decoder)


def _collate(trainer: Any, collate: Collate | None, row: Any) -> Any:
    """The row as the model would get it: a batch of one."""
    if collate is None:
        return row
    if trainer.args.remove_unused_columns and isinstance(row, Mapping):
        wanted = {*inspect.signature(type(trainer.model).forward).parameters, *_MASK_COLUMNS}
        row = {name: value for name, value in row.items() if name in wanted}
    return collate([row])

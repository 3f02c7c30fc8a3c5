"""Probe samples from the eval data of a running `transformers.Trainer`."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import numpy as np

from mui_callback.errors import ProbeSetError
from mui_callback.probe.freeze import random_state_kept
from mui_callback.probe.hub import iterate_rows
from mui_callback.probe.probe_set import ProbeSet

_COLUMNS = ("input_ids", "labels", "attention_mask", "position_ids", "decoder_input_ids")
_MASK_COLUMNS = ("labels", "label_ids", "completion_mask", "assistant_masks")
"""Columns beside the model's own that collators make labels from."""


def calling_trainer() -> Any:
    """The `Trainer` whose event is being handled, or None.

    An event brings everything but the Trainer itself, and the eval data is nowhere else before the first
    evaluation, so it is looked for among the callers.
    """
    trainer_class = sys.modules["transformers"].Trainer
    frame = sys._getframe(1)
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), trainer_class):
            return frame.f_locals["self"]
        frame = frame.f_back  # type: ignore[assignment]
    return None


def eval_probe_set(trainer: Any, max_samples: int) -> ProbeSet | None:
    """The first samples of each of the Trainer's eval data sets, as one task each; None if it has none.

    Rows of token ids go through the Trainer's own collator one by one, so the response tokens are those that its
    loss counts. Rows of text are used as text.

    Args:
        trainer: a `transformers.Trainer`.
        max_samples: samples taken of each data set.

    Raises:
        ProbeSetError: the rows are neither.
    """
    data = getattr(trainer, "eval_dataset", None)
    if data is None:
        return None
    tasks = data if isinstance(data, dict) else {"eval": data}
    probe_set: ProbeSet | None = None
    for name, rows in tasks.items():
        with random_state_kept():  # a data set may draw from the random state that training goes on with
            first = list(islice(iterate_rows(rows, f"eval_dataset {name!r}"), max_samples))
            task = _read_task(trainer, str(name).replace("/", "_"), first)
        probe_set = task if probe_set is None else probe_set | task
    return probe_set


def _read_task(trainer: Any, name: str, rows: list[Any]) -> ProbeSet:
    if not rows:
        raise ProbeSetError(f"eval_dataset {name!r}: expected at least one row, got none")
    if not isinstance(rows[0], Mapping):
        raise ProbeSetError(f"eval_dataset {name!r}: expected rows that are mappings, got {type(rows[0]).__name__}")
    if "input_ids" not in rows[0]:
        return ProbeSet.from_dataset(rows, task=name)
    # A collator may have a random state of its own, shared with training. If it has the model too, that is not copied.
    collate = copy.deepcopy(trainer.data_collator, {id(trainer.model): trainer.model})
    documents = [part for row in rows for part in _documents(_collate(trainer, collate, row))]
    encoder_decoder = bool(getattr(getattr(trainer.model, "config", None), "is_encoder_decoder", False))
    return ProbeSet.from_token_rows(documents, task=name, encoder_decoder=encoder_decoder)


def _collate(trainer: Any, collate: Callable[[list[Any]], Any] | None, row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row as the model would get it: a batch of one."""
    if collate is None:
        return row
    if trainer.args.remove_unused_columns:
        wanted = {*inspect.signature(type(trainer.model).forward).parameters, *_MASK_COLUMNS}
        row = {name: value for name, value in row.items() if name in wanted}
    batch = collate([row])
    return {name: batch[name] for name in _COLUMNS if batch.get(name) is not None}


def _documents(batch: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A packed row as its documents: where positions begin again, attention does not look back."""
    if "position_ids" not in batch:
        return [batch]
    columns = {name: np.asarray(values).reshape(-1) for name, values in batch.items()}
    starts = np.flatnonzero(columns.pop("position_ids") == 0)
    parts = {name: np.split(values, starts[starts > 0]) for name, values in columns.items()}
    return [dict(zip(parts, document, strict=True)) for document in zip(*parts.values(), strict=True)]

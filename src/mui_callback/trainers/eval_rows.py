"""Probe samples from rows of a trainer's eval data, as its own loss would see them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from mui_callback.errors import ProbeSetError
from mui_callback.probe.freeze import random_state_kept
from mui_callback.probe.hub import iterate_rows
from mui_callback.probe.probe_set import ProbeSet
from mui_callback.probe.samples import TokenSample

_COLUMNS = ("input_ids", "labels", "attention_mask", "position_ids", "decoder_input_ids")
_IGNORED = -100

Collate = Callable[[Any], Any]
"""From one row to a batch of it."""


@dataclass(frozen=True)
class EvalData:
    """One of the eval data sets of a trainer."""

    rows: Any
    """Any iterable of rows: mappings, tensors of token ids, or pairs of token ids and labels."""
    collate: Collate
    """What the trainer makes a batch with."""
    where: str
    """What the rows are, for messages."""


def read_tasks(tasks: Mapping[str, EvalData], max_samples: int, *, encoder_decoder: bool = False) -> ProbeSet | None:
    """The first samples of each data set, as one task each; None if there is none.

    Rows of token ids are collated one by one, so the response tokens are those that the loss counts. Rows of text are
    used as text.

    Args:
        tasks: the data sets by name.
        max_samples: samples taken of each.
        encoder_decoder: whether the model is one.

    Raises:
        ProbeSetError: the rows of one are nothing that can be probed.
    """
    probe_set: ProbeSet | None = None
    for name, data in tasks.items():
        with random_state_kept():  # a data set may draw from the random state that training goes on with
            task = _read_task(name.replace("/", "_"), data, max_samples, encoder_decoder)
        probe_set = task if probe_set is None else probe_set | task
    return probe_set


def _read_task(name: str, data: EvalData, max_samples: int, encoder_decoder: bool) -> ProbeSet:
    if isinstance(data.rows, Iterator):
        raise ProbeSetError(f"{data.where}: expected rows that can be read again, got {type(data.rows).__name__}")
    first = list(islice(iterate_rows(data.rows, data.where), max_samples))
    if not first:
        raise ProbeSetError(f"{data.where}: expected at least one row, got none")
    if isinstance(first[0], Mapping) and "input_ids" not in first[0]:
        return ProbeSet.from_dataset(first, task=name)
    batches = [_as_columns(data.collate(row), data.where) for row in first]
    documents = [part for batch in batches for row in _rows(batch) for part in _documents(row)]
    task = ProbeSet.from_token_rows(documents[:max_samples], task=name, encoder_decoder=encoder_decoder)
    if not any(sample.scored.any() for sample in task.tasks[name] if isinstance(sample, TokenSample)):
        raise ProbeSetError(f"{data.where}: expected labels of tokens to score, got none in {len(documents)} rows")
    return task


def _as_columns(batch: Any, where: str) -> Mapping[str, Any]:
    """A batch as columns of the names that transformers uses."""
    if isinstance(batch, Mapping):
        return {name: _transposed(batch[name]) for name in _COLUMNS if batch.get(name) is not None}
    if isinstance(batch, list | tuple) and len(batch) == 1:
        batch = batch[0]
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return _from_pair(np.atleast_2d(batch[0]), np.atleast_2d(batch[1]), where)
    ids = np.asarray(batch) if not isinstance(batch, list | tuple) else np.empty(())
    if ids.dtype.kind not in "iu" or ids.ndim > 2:
        raise ProbeSetError(
            f"{where}: expected batches that are mappings with input_ids, token ids, or pairs of token ids and labels; "
            f"got {type(batch).__name__}{f' of {len(batch)}' if isinstance(batch, list | tuple) else ''}"
        )
    return {"input_ids": ids}


def _transposed(values: Any) -> Any:
    """Rows of plain lists, which the default collator turns into one tensor for each position."""
    if isinstance(values, list) and all(getattr(value, "ndim", None) == 1 for value in values):
        return np.stack([np.asarray(value) for value in values], axis=-1)
    return values


def own_copy(collate: Any, *training: Any) -> Any:
    """A copy of a collator, which may have a random state that training goes on with.

    Args:
        collate: a function, a method or an object.
        training: what it may hold of the training, which is not copied.
    """
    try:
        return copy.deepcopy(collate, {id(part): part for part in training})
    except Exception:  # locks, files, tensors in the middle of a graph
        return collate


def _from_pair(ids: Any, labels: Any, where: str) -> Mapping[str, Any]:
    """Labels in the place of the token that they are, whether the pair has them there or one place earlier."""
    if ids.shape != labels.shape or ids.dtype.kind not in "iu" or labels.dtype.kind not in "iu":
        raise ProbeSetError(
            f"{where}: expected pairs of token ids and labels of one shape, got {ids.dtype} {ids.shape} and "
            f"{labels.dtype} {labels.shape}"
        )
    scored = labels != _IGNORED
    if (ids[scored] == labels[scored]).all():
        return {"input_ids": ids, "labels": labels}
    if (ids[:, 1:] == labels[:, :-1])[scored[:, :-1]].all():
        last = np.where(scored[:, -1:], labels[:, -1:], 0)
        ignored = np.full_like(last, _IGNORED)
        return {"input_ids": np.hstack([ids, last]), "labels": np.hstack([ignored, labels])}
    raise ProbeSetError(
        f"{where}: expected pairs of token ids and labels, which are the same ids or the next ones; got others"
    )


def _rows(batch: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A batch of any size as its rows."""
    columns = {name: np.atleast_2d(np.asarray(values)) for name, values in batch.items()}
    n_rows = max((len(values) for values in columns.values()), default=0)
    return [{name: values[min(row, len(values) - 1)] for name, values in columns.items()} for row in range(n_rows)]


def _documents(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A packed row as its documents: where positions begin again, attention does not look back."""
    if "position_ids" not in row:
        return [row]
    columns = dict(row)
    starts = np.flatnonzero(columns.pop("position_ids") == 0)
    parts = {name: np.split(values, starts[starts > 0]) for name, values in columns.items()}
    return [dict(zip(parts, document, strict=True)) for document in zip(*parts.values(), strict=True)]

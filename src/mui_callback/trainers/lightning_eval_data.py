"""Probe samples from the validation data of a running Lightning Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from mui_callback.probe.probe_set import ProbeSet
from mui_callback.trainers.eval_rows import Collate, read_task


def eval_probe_set(trainer: Any, max_samples: int) -> ProbeSet | None:
    """The first samples of each of the Trainer's ``val_dataloaders``, as one task each; None if it has none.

    The data set of a `DataLoader` is read and collated row by row: its sampler and its workers stay as they are. Other
    iterables are read as they come.

    Args:
        trainer: a Lightning Trainer.
        max_samples: samples taken of each.

    Raises:
        ProbeSetError: the rows cannot be probed; see `read_task`.
    """
    probe_set: ProbeSet | None = None
    for name, loader in _named(trainer.val_dataloaders).items():
        task = read_task(
            getattr(loader, "dataset", loader),
            name,
            f"val_dataloaders {name!r}",
            max_samples,
            collate=_collate(loader),
            encoder_decoder=False,
        )
        probe_set = task if probe_set is None else probe_set | task
    return probe_set


def _collate(loader: Any) -> Collate:
    collate = deepcopy(getattr(loader, "collate_fn", None))
    if collate is None or getattr(loader, "batch_size", 1) is None:  # its rows are batches already
        return lambda batch: batch
    return lambda row: collate([row])


def _named(loaders: Any) -> dict[str, Any]:
    if loaders is None:
        return {}
    if isinstance(loaders, Mapping):
        return {str(name).replace("/", "_"): loader for name, loader in loaders.items()}
    if isinstance(loaders, list | tuple):
        return {f"eval_{i}" if len(loaders) > 1 else "eval": loader for i, loader in enumerate(loaders)}
    return {"eval": loaders}

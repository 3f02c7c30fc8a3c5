"""Probe samples from the validation data of a running Lightning Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mui_callback.probe.probe_set import ProbeSet
from mui_callback.trainers.eval_rows import Collate, EvalData, own_copy, read_tasks


def eval_probe_set(trainer: Any, max_samples: int) -> ProbeSet | None:
    """The first samples of each of the Trainer's ``val_dataloaders``, as one task each; None if it has none.

    The data set of a `DataLoader` is read and collated row by row: its sampler and its workers stay as they are. Other
    iterables are read as they come.

    Args:
        trainer: a Lightning Trainer.
        max_samples: samples taken of each.

    Raises:
        ProbeSetError: the rows cannot be probed; see `read_tasks`.
    """
    tasks = {
        name: EvalData(getattr(loader, "dataset", loader), _collate(loader, trainer), f"val_dataloaders {name!r}")
        for name, loader in _named(trainer.val_dataloaders).items()
    }
    return read_tasks(tasks, max_samples)


def _collate(loader: Any, trainer: Any) -> Collate:
    training = (trainer, trainer.lightning_module, trainer.datamodule)
    collate = own_copy(getattr(loader, "collate_fn", None), *training)
    makes_batches = any(getattr(loader, name, None) is not None for name in ("batch_size", "batch_sampler"))
    if collate is None or not makes_batches:  # its rows are batches already
        return lambda batch: batch
    return lambda row: collate([row])


def _named(loaders: Any) -> dict[str, Any]:
    if loaders is None:
        return {}
    if isinstance(loaders, Mapping):
        return {str(name): loader for name, loader in loaders.items()}
    if isinstance(loaders, list | tuple):
        return {f"eval_{i}" if len(loaders) > 1 else "eval": loader for i, loader in enumerate(loaders)}
    return {"eval": loaders}

"""Whether `transformers.Trainer` restored the experts that it goes on with.

transformers 5 saves stacked experts one by one, and `Trainer(...).train(resume_from_checkpoint=...)` puts the names of
the checkpoint into the model as they are (transformers issue 48805): experts whose names differ stay as they were made.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_AT_ONCE = 2**22
"""Numbers that are looked at together, so that memory does not depend on the model."""


def warn_if_experts_are_not_restored(model: nn.Module, checkpoint: Path | None) -> None:
    """Warn if weights of the model that are in the checkpoint under other names have other values there.

    Compared are sums over one layer, whatever its weights are called and however they are split. A checkpoint without
    safetensors, as sharded training writes it, is not looked at.

    Args:
        model: the model that training goes on with.
        checkpoint: the directory that it goes on from.
    """
    if checkpoint is None:
        return
    try:
        lost = _find_lost(model, checkpoint)
    except Exception as error:  # a check must not be what ends the training
        message = f"It cannot be told whether {checkpoint} was restored as a whole: {type(error).__name__}: {error}"
        warnings.warn(message, stacklevel=2)
        return
    if lost is not None:
        warnings.warn(
            f"Resuming from {checkpoint} did not restore all weights: the model has {lost.mine}, the checkpoint has "
            f"{lost.theirs} and the like, which the Trainer does not put together (transformers issue 48805). Training "
            "goes on with other experts than those of the checkpoint, and they are what is measured. The way round: "
            f"load the model from the checkpoint, Trainer(model={type(model).__name__}.from_pretrained("
            f"{str(checkpoint)!r}), ...), and resume then.",
            stacklevel=2,
        )


class _Lost(NamedTuple):
    """Names of weights that are the same, or should be."""

    mine: str
    theirs: str


def _find_lost(model: nn.Module, checkpoint: Path) -> _Lost | None:
    files = _files_of_weights(checkpoint)
    parameters, known = dict(model.named_parameters()), model.state_dict().keys()
    missing = [name for name in parameters if name not in files and _layer_of(name) is not None]
    unknown = [name for name in files if name not in known and _layer_of(name) is not None]
    for name in missing:
        layer = _layer_of(name)
        mine = [parameters[other] for other in missing if _layer_of(other) == layer]
        theirs = [other for other in unknown if _layer_of(other) == layer]
        if theirs:
            same = all(
                abs(a - b) <= 1e-6 * max(abs(a), abs(b))
                for a, b in zip(_sums(mine), _sums(_load(theirs, files)), strict=True)
            )
            return None if same else _Lost(name, theirs[0])
    return None


def _files_of_weights(checkpoint: Path) -> dict[str, Path]:
    """The file that holds each weight."""
    if (checkpoint / _INDEX).is_file():
        index: dict[str, str] = json.loads((checkpoint / _INDEX).read_text())["weight_map"]
        return {name: checkpoint / file for name, file in index.items()}
    if not (checkpoint / _SINGLE).is_file():
        return {}
    from safetensors import safe_open

    with safe_open(checkpoint / _SINGLE, framework="pt") as file:
        return dict.fromkeys(file.keys(), checkpoint / _SINGLE)


def _load(names: Iterable[str], files: dict[str, Path]) -> Iterable[Tensor]:
    from safetensors import safe_open

    for name in names:
        with safe_open(files[name], framework="pt") as file:
            yield file.get_tensor(name)


def _sums(weights: Iterable[Tensor]) -> tuple[float, float]:
    """Σ|w| and Σw²: the same however weights are split, turned and put together."""
    total = [0.0, 0.0]
    for weight in weights:
        for part in torch.split(weight.detach().flatten(), _AT_ONCE):
            numbers = part.double()
            total[0] += float(numbers.abs().sum())
            total[1] += float(numbers.square().sum())
    return total[0], total[1]


def _layer_of(name: str) -> int | None:
    """The first number in a name."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)

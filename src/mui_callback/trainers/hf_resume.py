"""Whether `transformers.Trainer` restored the experts that it goes on with.

transformers 5 saves stacked experts one by one, and `Trainer(...).train(resume_from_checkpoint=...)` puts the names of
the checkpoint into the model as they are (transformers issue 48805): experts whose names differ stay as they were made.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mui_callback.forgiving import described, warn

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_AT_ONCE = 2**22
"""Numbers that are looked at together, so that memory does not depend on the model."""


def warn_if_experts_are_not_restored(model: nn.Module, checkpoint: Path | None) -> None:
    """Warn if weights of the model that are in the checkpoint under other names have other values there.

    Compared are the first, the middle and the last layer that have such weights, to the precision of bfloat16, whatever
    the weights are called and however they are split. A checkpoint without safetensors, as sharded training writes it,
    is not looked at.

    Args:
        model: the model that training goes on with.
        checkpoint: the directory that it goes on from.
    """
    if checkpoint is None:
        return
    try:
        lost = _find_lost(model, checkpoint)
    except Exception as error:  # a check must not be what ends the training
        warn(f"It cannot be told whether {checkpoint} was restored as a whole: {described(error)}")
        return
    if lost is not None:
        warn(
            f"Resuming from {checkpoint} did not restore all weights: the model has {lost.mine}, the checkpoint has "
            f"{lost.theirs} and the like, which the Trainer does not put together (transformers issue 48805). Training "
            "goes on with other experts than those of the checkpoint, and they are what is measured. The way round: "
            f"load the model from the checkpoint, Trainer(model={type(model).__name__}.from_pretrained("
            f"{str(checkpoint)!r}), ...), and resume then."
        )


class _Lost(NamedTuple):
    """Names of weights that are the same, or should be."""

    mine: str
    theirs: str


def _find_lost(model: nn.Module, checkpoint: Path) -> _Lost | None:
    files = _files_of_weights(checkpoint)
    if not files or _is_sharded(model):
        return None
    known = model.state_dict()
    mine, theirs = _by_layer(name for name in known if name not in files), _by_layer(files.keys() - known.keys())
    both = sorted(mine.keys() & theirs.keys())
    for layer in sorted({both[0], both[len(both) // 2], both[-1]} if both else ()):
        dtype = _coarsest([known[name] for name in mine[layer]], _load(theirs[layer], files))
        is_restored = _same((known[name] for name in mine[layer]), _load(theirs[layer], files), dtype)
        # Some names have another number before that of the layer. All weights together have none.
        if not is_restored and not _same(
            (known[name] for names in mine.values() for name in names),
            _load((name for names in theirs.values() for name in names), files),
            dtype,
        ):
            return _Lost(max(mine[layer], key=lambda name: known[name].numel()), theirs[layer][0])
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


def _is_sharded(model: nn.Module) -> bool:
    """Whether a process has parts of the weights only, so that to ask for them is to wait for the others."""
    wrapped = any("FullyShardedDataParallel" in type(module).__name__ for module in model.modules())
    return wrapped or any(type(p) is not nn.Parameter or p.numel() == 0 for p in model.parameters())


def _coarsest(*weights: Iterable[Tensor]) -> torch.dtype:
    """The dtype with the fewest digits, in which weights agree that were saved or loaded in another one."""
    dtypes = {weight.dtype for group in weights for weight in group if weight.dtype.is_floating_point}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def _same(mine: Iterable[Tensor], theirs: Iterable[Tensor], dtype: torch.dtype) -> bool:
    """Whether weights are the same, to the precision of bfloat16, but for how they are split, turned and joined."""
    return _sums(mine, dtype) == _sums(theirs, dtype)


def _sums(weights: Iterable[Tensor], dtype: torch.dtype) -> tuple[int, int]:
    """Of the bits of all numbers as bfloat16, and of their squares: exact, whatever the order."""
    total = [0, 0]
    for weight in weights:
        for part in torch.split(weight.detach().flatten(), _AT_ONCE):
            bits = part.to(dtype).to(torch.bfloat16).view(torch.int16).to(torch.int64)
            total[0] += int(bits.sum())
            total[1] += int(bits.square().sum())
    return total[0], total[1]


def _by_layer(names: Iterable[str]) -> dict[int, list[str]]:
    """By the first number in them; names without one are left out."""
    layers: dict[int, list[str]] = {}
    for name in names:
        numbers = [int(part) for part in name.split(".") if part.isdecimal()]
        if numbers:
            layers.setdefault(numbers[0], []).append(name)
    return layers

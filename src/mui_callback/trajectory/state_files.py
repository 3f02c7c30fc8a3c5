"""Weights alone, from the files that Lightning and DeepSpeed leave: names to tensors on the CPU.

The files are pickles. torch reads them as weights only, which runs no code, unless the caller allows more.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mui_callback.loading import ModelLoadError

_MODEL_STATES = "*model_states.pt"
State = dict[str, Tensor]


def is_deepspeed(directory: Path) -> bool:
    """Whether it is what DeepSpeed writes of one step."""
    return directory.is_dir() and any(directory.glob(_MODEL_STATES))


def deepspeed_step(directory: Path) -> Path | None:
    """The directory of a step inside of another one: of a checkpoint of transformers' Trainer (``global_step500``) or
    of Lightning (``checkpoint``). None where there is none."""
    inside = (child for child in sorted(directory.iterdir()) if is_deepspeed(child)) if directory.is_dir() else iter(())
    return next(inside, None)


def read_state(path: Path, *, allow_pickle: bool = False) -> State:
    """Read the weights of one checkpoint.

    Args:
        path: a file of Lightning, or what DeepSpeed writes of one step: without ZeRO and with its stages 1 to 3, with
            the experts of its MoE layers in files of their own.
        allow_pickle: read a file also if it holds more than tensors and plain values, which can run code.

    Raises:
        ModelLoadError: it cannot be read, or not safely.
    """
    with _explained(path):
        return _deepspeed_state(path, allow_pickle) if path.is_dir() else _lightning_state(path, allow_pickle)


def _lightning_state(file: Path, allow_pickle: bool) -> State:
    found = _read(file, allow_pickle)
    if not isinstance(found, dict) or not isinstance(found.get("state_dict"), dict):
        raise ModelLoadError(f"{file}: expected a checkpoint of Lightning, with a state_dict")
    return _tensors(found["state_dict"])


def _deepspeed_state(directory: Path, allow_pickle: bool) -> State:
    files = sorted(directory.glob(_MODEL_STATES))
    experts = [file for file in files if "_expert_" in file.name]
    if any(file.name.startswith("zero_pp_rank") for file in files):  # ZeRO 3 has the weights with the optimizer
        try:
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
        except ImportError as error:
            raise ModelLoadError(f"{directory}: needs DeepSpeed: pip install 'mui-callback[deepspeed]'") from error
        whole: Any = get_fp32_state_dict_from_zero_checkpoint(str(directory.parent), tag=directory.name)
        return _tensors(whole)
    ranks = [file for file in files if file not in experts]
    if len(ranks) != 1:
        names = ", ".join(file.name for file in ranks) or "none"
        raise ModelLoadError(f"{directory}: expected the weights of one model-parallel process, got {names}")
    state = _tensors(_read(ranks[0], allow_pickle)["module"])
    for file in experts:
        state |= _tensors(_read(file, allow_pickle))
    return state


def _read(file: Path, allow_pickle: bool) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error).lower() and "unsupported" not in str(error).lower():
            raise
        if not allow_pickle:
            raise ModelLoadError(
                f"{file}: holds more than weights, which can run code when it is read. If you trust its origin, set"
                " allow_pickle."
            ) from error
    return torch.load(file, map_location="cpu", weights_only=False, mmap=True)


def _tensors(found: Any) -> State:
    return {str(name): value for name, value in dict(found).items() if isinstance(value, Tensor)}


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except ModelLoadError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelLoadError(f"{path}: {type(error).__name__}: {said}") from error

"""Weights alone, from the files that Lightning and DeepSpeed leave: names to tensors on the CPU.

The files are pickles. torch reads them as weights only, which runs no code; objects of other classes, such as
hyperparameters, become empty dictionaries, so that nobody has to trust a file for what is not needed of it.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mui_callback.forgiving import in_a_line
from mui_callback.loading import ModelLoadError
from mui_callback.trajectory.zero3 import State, whole_weights

_MODEL_STATES = "*model_states.pt"
_SHARDS_INDEX = ".metadata"
_PARTITION = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_(model|optim)_states\.pt$")


def weights_of(path: Path) -> Path | None:
    """Where the weights of a checkpoint are, if they are alone: the file, the directory that DeepSpeed writes of one
    step, or the only such directory inside of another one, of a checkpoint of transformers' Trainer
    (``global_step500``) or of Lightning (``checkpoint``). None where there are none."""
    if path.is_file():
        return path if path.suffix == ".ckpt" else None
    if _holds_weights(path):
        return path
    children = [child for child in path.iterdir() if not child.name.startswith("optimizer")] if path.is_dir() else []
    inside = [child for child in children if _holds_weights(child)]
    return inside[0] if len(inside) == 1 else None  # more are the steps of a run


def read_state(path: Path) -> State:
    """Read the weights of one checkpoint; nothing in it is run.

    Args:
        path: a file of Lightning, or what DeepSpeed writes of one step: without ZeRO and with its stages 1 to 3, with
            the experts of its MoE layers in files of their own. Of stage 3 these are the optimizer's, in float32.

    Raises:
        ModelLoadError: it cannot be read.
    """
    with _explained(path):
        return _state_of_file(path) if path.is_file() else _state_of_directory(path)


def _holds_weights(directory: Path) -> bool:
    return (directory / _SHARDS_INDEX).is_file() or any(directory.glob(_MODEL_STATES))


def _state_of_file(file: Path) -> State:
    found = _read(file)
    for name in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    if not isinstance(found, Mapping):
        raise ModelLoadError(f"{file}: expected a checkpoint with a state_dict, got {type(found).__name__}")
    return _tensors(found)


def _state_of_directory(directory: Path) -> State:
    if (directory / _SHARDS_INDEX).is_file():
        raise ModelLoadError(
            f"{directory}: the weights are in shards of torch.distributed. Put them into one file that can be read:"
            " python -m torch.distributed.checkpoint.format_utils dcp_to_torch DIRECTORY FILE.ckpt"
        )
    files = sorted(directory.glob(_MODEL_STATES))
    if any("zero_pp_rank" in file.name for file in files):
        return _partitioned_state(directory, files)
    experts = [file for file in files if "expert_" in file.name]
    _check_one_model(directory, others := [file for file in files if file not in experts], n=1)
    state = _tensors(_read(others[0])["module"])
    for file in experts:
        state |= _tensors(_read(file))
    return state


def _partitioned_state(directory: Path, files: list[Path]) -> State:
    """Of ZeRO 3, which has the weights with the optimizer."""
    partitions = {
        (found[2], int(found[1])): file for file in directory.iterdir() if (found := _PARTITION.search(file.name))
    }
    n = sum(kind == "model" for kind, _ in partitions)
    _check_one_model(directory, files, n=n)
    missing = [rank for rank in range(n) if ("model", rank) not in partitions or ("optim", rank) not in partitions]
    if missing:
        raise ModelLoadError(f"{directory}: expected the files of {n} processes, found none of process {missing[0]}")
    models, optimizers = ([_read(partitions[kind, rank]) for rank in range(n)] for kind in ("model", "optim"))
    return whole_weights(models, optimizers, where=str(directory))


def _check_one_model(directory: Path, files: list[Path], *, n: int) -> None:
    if len(files) != n:
        names = ", ".join(file.name for file in files[:3]) + (" …" if len(files) > 3 else "")
        raise ModelLoadError(
            f"{directory}: expected the weights of one model-parallel process, got {names or 'none'}. What tensor or"
            " pipeline parallelism has split is not put together here; save the model whole."
        )


def _read(file: Path) -> Any:
    is_zip = zipfile.is_zipfile(file)
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(file) if is_zip else []
    with torch.serialization.safe_globals([(_Ignored, name) for name in unknown]):
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
        except pickle.UnpicklingError as error:
            _, _, said = str(error).partition("WeightsUnpickler error:")
            raise ModelLoadError(
                f"{file}: holds more than weights, which is not run ({said.strip().partition(chr(10))[0] or error})."
                " Where you trust its origin, load it with torch and save its state_dict alone."
            ) from error


class _Ignored:
    """Stands for any class and function that torch does not know to be harmless."""

    def __new__(cls, *args: Any) -> Any:
        return OrderedDict()  # can be given both items and attributes by a pickle


def _tensors(found: Mapping[Any, Any]) -> State:
    return {str(name): value for name, value in found.items() if isinstance(value, Tensor)}


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(f"{path}: {type(error).__name__}: {in_a_line(error)[:300]}") from error

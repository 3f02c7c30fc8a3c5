"""From a model of a study to its checkpoints: names and patterns are looked up on the hub or in a directory."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from mui_callback.errors import MUIError
from mui_callback.loading import CHECKPOINTS, ModelLoadError, ModelSource, can_be_hub_id, load_tokenizer
from mui_callback.trajectory.architecture import Architecture
from mui_callback.trajectory.checkpoint import CheckpointId
from mui_callback.trajectory.config import ModelConfig
from mui_callback.trajectory.downloads import Downloads
from mui_callback.trajectory.hub import HubRevision, revisions
from mui_callback.trajectory.places import ModelDirectory, Place, StateFiles
from mui_callback.trajectory.state_files import weights_of

_PATTERN = re.compile(r"[*?\[]")


@dataclass(frozen=True, eq=False)
class StudiedCheckpoint:
    """A checkpoint that is to be measured."""

    id: CheckpointId
    config: ModelConfig
    """Of its model."""
    place: Place

    def load(self, device: str) -> nn.Module:
        """The model with its weights, in eval mode."""
        return self.place.load(dtype=self.config.dtype, device=device)

    def load_skeleton(self) -> nn.Module:
        """The model without its weights."""
        return self.place.load_skeleton(dtype=self.config.dtype)

    def load_tokenizer(self) -> Any | None:
        """The tokenizer that is named for the model, or else comes with the checkpoint."""
        if self.config.tokenizer is None:
            return self.place.load_tokenizer()
        return load_tokenizer(_source(self.config, self.config.tokenizer))


def list_checkpoints(
    config: ModelConfig, downloads: Downloads, measured: Sequence[str] = ()
) -> list[StudiedCheckpoint]:
    """All checkpoints of a model, in the order in which they are measured.

    A name that is not there is listed all the same, and found missing when it is its turn; a pattern that nothing
    matches is an error.

    Args:
        config: of the model.
        downloads: of the study.
        measured: labels of checkpoints that were measured: they count as there, as runs delete old ones.

    Raises:
        MUIError: there is no such path, no checkpoint, or a pattern matches none.
    """
    directory = Path(os.path.expanduser(config.source))
    is_local = directory.exists()
    if not is_local and not can_be_hub_id(config.source):
        raise MUIError(f"{config.source}: there is no such path")
    labels = _in_directory(directory, config, measured) if is_local else _on_hub(config, measured)
    ids = [CheckpointId.named(config.title, label, tokens_per_step=config.tokens_per_step) for label in labels]
    ids = _some(ids, config.at_most)
    if is_local:
        return [StudiedCheckpoint(one, config, _local(directory, one.label, config)) for one in ids]
    return [
        StudiedCheckpoint(one, config, HubRevision(_source(config, config.source, one.label), downloads)) for one in ids
    ]


def _on_hub(config: ModelConfig, measured: Sequence[str]) -> list[str]:
    if not config.checkpoints:
        return ["main"]
    there = revisions(config.source) if any(map(_PATTERN.search, config.checkpoints)) else []
    return _chosen(config, list(dict.fromkeys((*there, *measured))))


def _in_directory(directory: Path, config: ModelConfig, measured: Sequence[str]) -> list[str]:
    there = [child.name for child in directory.iterdir() if _is_checkpoint(child)] if directory.is_dir() else []
    if there:
        there = list(dict.fromkeys((*there, *measured)))
    if config.checkpoints:
        return _chosen(config, there)
    if there:
        return _in_order(there)
    if _is_checkpoint(directory):
        return [directory.resolve().name]
    raise MUIError(
        f"{directory}: expected a model (config.json with weights), or checkpoints: checkpoint-*, *.ckpt, global_step*"
    )


def _chosen(config: ModelConfig, there: Sequence[str]) -> list[str]:
    labels: list[str] = []
    for name in config.checkpoints:
        if not _PATTERN.search(name):
            labels.append(name)
            continue
        matching = [one for one in there if fnmatchcase(one, name)]
        if not matching:
            shown = ", ".join(_in_order(there)[:5]) + (", …" if len(there) > 5 else "") or "nothing"
            raise MUIError(f"{config.source}: no checkpoint matches {name!r}; there is {shown}")
        labels += _in_order(matching)
    return list(dict.fromkeys(labels))


def _in_order(labels: Sequence[str]) -> list[str]:
    """By steps; those without one last, as a main branch is."""

    def place(label: str) -> tuple[float, list[tuple[int, str]]]:
        step = CheckpointId.named("", label).step
        parts = [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", label)]
        return float("inf") if step is None else step, parts

    return sorted(labels, key=place)


def _some(ids: list[CheckpointId], at_most: int | None) -> list[CheckpointId]:
    if at_most is None or len(ids) <= at_most:
        return ids
    if at_most == 1:
        return ids[-1:]
    return [ids[round(i * (len(ids) - 1) / (at_most - 1))] for i in range(at_most)]


def _source(config: ModelConfig, name: str, revision: str | None = None) -> ModelSource:
    """What is at a name, with what the config lets be done to read it."""
    return ModelSource(name, revision, config.trust_remote_code, config.allow_pickle)


def _is_checkpoint(path: Path) -> bool:
    return _is_model(path) or weights_of(path) is not None


def _is_model(directory: Path) -> bool:
    return (directory / "config.json").is_file() and any((directory / name).is_file() for name in CHECKPOINTS)


def _local(directory: Path, label: str, config: ModelConfig) -> Place:
    is_itself = directory.is_file() or (label == directory.resolve().name and _is_checkpoint(directory))
    path = directory if is_itself else directory / label
    weights = None if _is_model(path) else weights_of(path)
    if weights is None:
        return ModelDirectory(_source(config, str(path)))
    named = config.architecture or (str(path) if (path / "config.json").is_file() else None)
    if named is None:
        raise ModelLoadError(
            f"{path}: has weights only; expected `architecture`, the model's config or a function that makes it"
        )
    return StateFiles(weights, Architecture(_source(config, named)))

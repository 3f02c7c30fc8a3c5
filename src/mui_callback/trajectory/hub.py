"""Checkpoints on the hub: which revisions there are, and one of them as a place.

What is read of a repository is its top level: weights as safetensors, config, tokenizer and, if it may be run, code.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, scan_cache_dir, snapshot_download
from huggingface_hub.utils import disable_progress_bars
from torch import nn

from mui_callback.loading import DType, ModelLoadError, ModelSource, load_skeleton, load_tokenizer
from mui_callback.trajectory.places import ModelDirectory

_SAFE, _PICKLED = "*.safetensors", "*.bin"
_WITH_WEIGHTS = ("*.json", "*.model", "*.txt", "*.jinja")
_LEFT_OUT = ("*/*", "consolidated*", "training_args.bin", "optimizer*", "scheduler*", "rng_state*")


def revisions(repo_id: str) -> list[str]:
    """All branches and tags of a model on the hub.

    Raises:
        ModelLoadError: it is not there, or the hub cannot be reached.
    """
    try:
        refs = HfApi().list_repo_refs(repo_id)
    except Exception as error:
        raise _load_error(repo_id, error) from error
    return list(dict.fromkeys(ref.name for ref in (*refs.branches, *refs.tags)))


@dataclass
class HubRevision:
    """One revision of a model on the hub.

    Args:
        source: the model, with a revision.
        downloads: of the study.
    """

    source: ModelSource
    downloads: Downloads

    @property
    def n_bytes(self) -> int:
        """See `Place.n_bytes`."""
        return sum(file.file_size for file in self._files)

    @property
    def n_bytes_to_fetch(self) -> int:
        """See `Place.n_bytes_to_fetch`."""
        return sum(file.file_size for file in self._files if file.will_download)

    def fetch(self) -> None:
        """Download it, if it is not in the cache of the hub.

        Raises:
            ModelLoadError: it is not there, or the hub cannot be reached.
        """
        if any(file.will_download for file in self._files):
            self.downloads.add(self.source.name, self._files[0].commit_hash)
        _ = self._snapshot

    def load(self, *, dtype: DType, device: str) -> nn.Module:
        """See `Place.load`."""
        return self._directory.load(dtype=dtype, device=device)

    def load_skeleton(self, *, dtype: DType) -> nn.Module:
        """See `Place.load_skeleton`; reads the config alone."""
        return load_skeleton(self.source, dtype=dtype)

    def load_tokenizer(self) -> Any | None:
        """See `Place.load_tokenizer`; reads no weights, which may not be there yet."""
        return load_tokenizer(self.source)

    def let_go(self) -> None:
        """Delete it from the cache, if the study has downloaded it; what other revisions have too stays there."""
        self.downloads.delete(self.source.name, self._files[0].commit_hash)

    @property
    def _directory(self) -> ModelDirectory:
        return ModelDirectory(replace(self.source, name=self._snapshot, revision=None))

    @cached_property
    def _files(self) -> list[Any]:
        """What is read of the repository."""
        found = self._ask(dry_run=True, patterns=(*self._patterns, _SAFE))
        if self.source.allow_pickle and not any(file.filename.endswith(".safetensors") for file in found):
            found = self._ask(dry_run=True, patterns=(*self._patterns, _PICKLED))
        if not found:
            raise ModelLoadError(f"{self.source}: expected a model, found no file of one")
        return list(found)

    @cached_property
    def _snapshot(self) -> str:
        """The directory that has it."""
        return str(self._ask(dry_run=False, patterns=tuple(file.filename for file in self._files)))

    @property
    def _patterns(self) -> tuple[str, ...]:
        return (*_WITH_WEIGHTS, "*.py") if self.source.trust_remote_code else _WITH_WEIGHTS

    def _ask(self, *, dry_run: bool, patterns: Iterable[str]) -> Any:
        disable_progress_bars()
        try:
            return snapshot_download(
                self.source.name,
                revision=self.source.revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(_LEFT_OUT),
                dry_run=dry_run,
            )
        except Exception as error:
            raise _load_error(str(self.source), error) from error


@dataclass(frozen=True)
class Downloads:
    """What a study has downloaded, so that it deletes nothing else; kept in a file, as the study may be killed."""

    file: Path

    def add(self, repo_id: str, commit: str) -> None:
        """To be called before."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps([repo_id, commit]) + "\n")

    def delete(self, repo_id: str, commit: str) -> None:
        """Delete a snapshot from the cache if it is one of these."""
        if [repo_id, commit] not in self._all():
            return
        with suppress(ValueError):  # the cache holds something else, or nothing
            scan_cache_dir(constants.HF_HUB_CACHE).delete_revisions(commit).execute()

    def _all(self) -> list[Any]:
        if not self.file.exists():
            return []
        lines = self.file.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.endswith("]")]  # the last one may be cut off


def _load_error(what: str, error: Exception) -> ModelLoadError:
    said = " ".join(str(error).split())[:300] or type(error).__name__
    return error if isinstance(error, ModelLoadError) else ModelLoadError(f"{what}: {said}")

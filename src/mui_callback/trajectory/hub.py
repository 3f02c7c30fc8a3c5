"""Checkpoints on the hub: which revisions there are, and one of them as a place.

What is read of a repository is its top level: weights as safetensors, config, tokenizer and, if it may be run, code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import disable_progress_bars, filter_repo_objects
from torch import nn

from mui_callback.forgiving import in_a_line
from mui_callback.loading import DType, ModelLoadError, ModelSource, load_skeleton, load_tokenizer
from mui_callback.trajectory.downloads import Downloads
from mui_callback.trajectory.places import ModelDirectory

_SAFE, _PICKLED = "*.safetensors", "*.bin"
_WITH_WEIGHTS = ("*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja")
_LEFT_OUT = ("*/*", "consolidated*", "training_args.bin", "optimizer*", "scheduler*", "rng_state*")


def revisions(repo_id: str) -> list[str]:
    """All branches and tags of a model on the hub.

    Raises:
        ModelLoadError: it is not there, or the hub cannot be reached.
    """
    with _explained(repo_id):
        refs = HfApi().list_repo_refs(repo_id)
    return list(dict.fromkeys(ref.name for ref in (*refs.branches, *refs.tags)))


@dataclass(frozen=True)
class _Listing:
    """What is read of a revision."""

    commit: str
    sizes: Mapping[str, int]
    """By file, in bytes."""


@dataclass
class HubRevision:
    """One revision of a model on the hub; where the hub cannot be reached, what the cache has of it.

    Args:
        source: the model, with a revision.
        downloads: of the study.
    """

    source: ModelSource
    downloads: Downloads
    _directory: ModelDirectory | None = field(default=None, init=False)
    """Where it is, between `fetch` and `let_go`."""

    @property
    def n_bytes(self) -> int:
        """See `Place.n_bytes`."""
        return sum(self._listing.sizes.values())

    @property
    def n_bytes_to_fetch(self) -> int:
        """See `Place.n_bytes_to_fetch`; what another revision in the cache has too is counted all the same."""
        return sum(size for file, size in self._listing.sizes.items() if not self._is_cached(file))

    @property
    def weights(self) -> str | None:
        """The commit, once it is fetched: a revision is taken for what it was, as to ask for each takes long."""
        return None if self._directory is None else self._listing.commit

    def fetch(self) -> None:
        """Download it, if it is not in the cache of the hub.

        Raises:
            ModelLoadError: it is not there, or the hub cannot be reached.
        """
        self.__dict__.pop("_listing", None)  # the branch may have moved on
        commit, files = self._listing.commit, [*self._listing.sizes]
        weights = [file for file in files if file.endswith((_SAFE[1:], _PICKLED[1:]))]
        if weights and not any(map(self._is_cached, weights)):
            self.downloads.add(self.source, commit)
        disable_progress_bars()
        with _explained(self.source):
            path = snapshot_download(self.source.name, revision=self.source.revision, allow_patterns=files)
        self._directory = ModelDirectory(replace(self.source, name=path, revision=None))

    def load(self, *, dtype: DType, device: str) -> nn.Module:
        """See `Place.load`."""
        if self._directory is None:
            raise ModelLoadError(f"{self.source}: has to be fetched before it is loaded")
        return self._directory.load(dtype=dtype, device=device)

    def load_skeleton(self, *, dtype: DType) -> nn.Module:
        """See `Place.load_skeleton`; no more than the config is downloaded."""
        return load_skeleton(self.source, dtype=dtype)

    def load_tokenizer(self) -> Any | None:
        """See `Place.load_tokenizer`; no more than it is downloaded."""
        return load_tokenizer(self.source) if self._directory is None else self._directory.load_tokenizer()

    def let_go(self) -> None:
        """Delete it from the cache, if the study has downloaded it; what other revisions have too stays there."""
        self._directory = None
        self.downloads.delete(self.source)

    @cached_property
    def _listing(self) -> _Listing:
        try:
            with _explained(self.source):
                info = HfApi().model_info(self.source.name, revision=self.source.revision, files_metadata=True)
            commit, there = str(info.sha), {file.rfilename: file.size or 0 for file in info.siblings or ()}
        except ModelLoadError as error:
            if isinstance(error.__cause__, RepositoryNotFoundError | RevisionNotFoundError | GatedRepoError):
                raise
            commit, there = self._in_cache(error)
        has_safe = any(filter_repo_objects(there, allow_patterns=_SAFE, ignore_patterns=[*_LEFT_OUT]))
        weights = _PICKLED if self.source.allow_pickle and not has_safe else _SAFE
        files = filter_repo_objects(there, allow_patterns=[*self._small, weights], ignore_patterns=[*_LEFT_OUT])
        sizes = {file: there[file] for file in files}
        if not sizes:
            raise ModelLoadError(f"{self.source}: expected a model, found no file of one")
        return _Listing(commit, sizes)

    @property
    def _small(self) -> tuple[str, ...]:
        return (*_WITH_WEIGHTS, "*.py") if self.source.trust_remote_code else _WITH_WEIGHTS

    def _in_cache(self, error: ModelLoadError) -> tuple[str, dict[str, int]]:
        """The commit and the files that were downloaded earlier, where the hub gives only an error."""
        try:
            found = snapshot_download(
                self.source.name,
                revision=self.source.revision,
                allow_patterns=[*self._small, _SAFE],
                ignore_patterns=[*_LEFT_OUT],
                local_files_only=True,
            )
        except Exception:
            raise error from None
        directory = Path(found)
        return directory.name, {file.name: file.stat().st_size for file in directory.iterdir() if file.is_file()}

    def _is_cached(self, file: str) -> bool:
        return isinstance(try_to_load_from_cache(self.source.name, file, revision=self._listing.commit), str)


@contextmanager
def _explained(what: str | ModelSource) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        tried = "" if isinstance(error, RevisionNotFoundError) else " there is no such path, and as a hub id:"
        raise ModelLoadError(f"{what}:{tried} {in_a_line(error)[:300]}") from error

"""Where the weights of a checkpoint are, whatever wrote them: one interface for all of them.

transformers is needed to load a model, so this is imported where a study is run.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from mui_callback.loading import DType, ModelLoadError, ModelSource, load_pretrained, load_skeleton, load_tokenizer
from mui_callback.trajectory.architecture import Architecture
from mui_callback.trajectory.state_files import read_state

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_BESIDE = ("config.json", "generation_config.json", "tokenizer*", "special_tokens*", "vocab*", "*.model", "*.jinja")
"""What the numbers of a model depend on, too."""
_PARTS, _SOME = 16, 2**13
"""Parts of a file that tell it from others, its ends among them, and bytes of each."""


class Place(Protocol):
    """Where a checkpoint is."""

    @property
    def n_bytes(self) -> int:
        """Size of the files that are read.

        Raises:
            Exception: it is not there, or nobody can say.
        """

    @property
    def n_bytes_to_fetch(self) -> int:
        """How much of them has to be downloaded first."""

    @property
    def weights(self) -> str | None:
        """What tells the weights, and what is read with them, from others at the same place; None where they are not on
        this machine."""

    def fetch(self) -> None:
        """Make sure that all files are on this machine; may take long.

        Raises:
            Exception: they cannot be had.
        """

    def load(self, *, dtype: DType, device: str) -> nn.Module:
        """The model with its weights, in eval mode.

        Raises:
            MUIError: it cannot be read, or not safely.
        """

    def load_skeleton(self, *, dtype: DType) -> nn.Module:
        """The model without weights, on the meta device; the same may go wrong."""

    def load_tokenizer(self) -> Any | None:
        """Its tokenizer; None where there is none."""

    def let_go(self) -> None:
        """Delete what `fetch` has downloaded, if anything."""


@dataclass(frozen=True)
class ModelDirectory:
    """A model of transformers on this machine, as ``save_pretrained`` writes it."""

    source: ModelSource

    @property
    def n_bytes(self) -> int:
        """See `Place.n_bytes`."""
        directory = self._existing()
        n_bytes = next(filter(None, (_size(directory, pattern) for pattern in _WEIGHTS)), 0)
        if not n_bytes:
            raise ModelLoadError(f"{self.source}: expected weights, found none")
        return n_bytes

    @property
    def n_bytes_to_fetch(self) -> int:
        """Nothing."""
        return 0

    @property
    def weights(self) -> str | None:
        """See `Place.weights`."""
        directory = Path(self.source.location)
        is_there = any(_size(directory, pattern) for pattern in _WEIGHTS)
        return _digest(directory, *_WEIGHTS, *_BESIDE) if is_there else None

    def fetch(self) -> None:
        """Nothing is to be done."""

    def load(self, *, dtype: DType, device: str) -> nn.Module:
        """See `Place.load`."""
        self._existing()
        return load_pretrained(self.source, dtype=dtype, device=device)

    def load_skeleton(self, *, dtype: DType) -> nn.Module:
        """See `Place.load_skeleton`."""
        self._existing()
        return load_skeleton(self.source, dtype=dtype)

    def load_tokenizer(self) -> Any | None:
        """See `Place.load_tokenizer`."""
        return load_tokenizer(self.source)

    def let_go(self) -> None:
        """Nothing is deleted."""

    def _existing(self) -> Path:
        """The directory; a name that is none would be taken for a hub id."""
        directory = Path(self.source.location)
        if not directory.is_dir():
            raise ModelLoadError(f"{self.source}: there is no such directory")
        return directory


@dataclass(frozen=True)
class StateFiles:
    """Weights alone, as Lightning and DeepSpeed write them, and the model that they are of."""

    path: Path
    """A ``.ckpt`` file, or the directory of one step."""
    architecture: Architecture

    @property
    def n_bytes(self) -> int:
        """See `Place.n_bytes`."""
        return self.path.stat().st_size if self.path.is_file() else _size(self.path, "**/*")

    @property
    def n_bytes_to_fetch(self) -> int:
        """Nothing."""
        return 0

    @property
    def weights(self) -> str | None:
        """See `Place.weights`."""
        return _digest(self.path, "**/*") if self.path.is_dir() else _digest(self.path.parent, self.path.name)

    def fetch(self) -> None:
        """Nothing is to be done."""

    def load(self, *, dtype: DType, device: str) -> nn.Module:
        """See `Place.load`."""
        return self.architecture.with_weights(read_state(self.path), dtype=dtype, device=device, where=str(self.path))

    def load_skeleton(self, *, dtype: DType) -> nn.Module:
        """See `Place.load_skeleton`."""
        return self.architecture.skeleton(dtype=dtype)

    def load_tokenizer(self) -> Any | None:
        """That of the architecture."""
        return self.architecture.tokenizer()

    def let_go(self) -> None:
        """Nothing is deleted."""


def _size(directory: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in directory.glob(pattern) if file.is_file())


def _digest(directory: Path, *patterns: str) -> str | None:
    """Of the names, the sizes and parts of files; None without any. To read them whole would take long."""
    files = sorted({file for pattern in patterns for file in directory.glob(pattern) if file.is_file()})
    digest = hashlib.sha256()
    for file in files:
        n_bytes = file.stat().st_size
        digest.update(f"{file.relative_to(directory)} {n_bytes}\n".encode())
        with file.open("rb") as content:
            for start in range(0, n_bytes, max(ceil((n_bytes - _SOME) / (_PARTS - 1)), _SOME)):
                content.seek(start)
                digest.update(content.read(_SOME))
    return digest.hexdigest() if files else None

"""Token ids of texts, kept on disk, so that a probe set is tokenised once and not at each start of a run.

Kept is what fast tokenizers of transformers return, for their serialisation says all that it depends on. Files are
in ``$XDG_CACHE_HOME/mui-callback/tokens`` (``~/.cache``, if that is not set), or in the directory that the environment
variable MUI_CALLBACK_CACHE names; "off" turns all of this off. Each is of one probe set and one tokenizer.
"""

from __future__ import annotations

import json
import os
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b, sha256
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from mui_callback.forgiving import attempt, described, logger, warn
from mui_callback.probe.probe_set import ProbeSet
from mui_callback.probe.samples import IntArray, ProbeSample
from mui_callback.whole_file import replaced_at_once

VARIABLE = "MUI_CALLBACK_CACHE"
_FORMAT = "mui-tokens-1"
_DIGEST = 16
"""Bytes of the digest of a text."""
_WORTH = 500
"""Texts, from which tokenising them takes longer than looking at what the tokenizer is: about 0.1 s."""
_NO_MATTER = frozenset(
    {"_tokenizer", "name_or_path", "init_inputs", "init_kwargs", "files_loaded", "deprecation_warnings"}
)
"""Attributes of a tokenizer that say where it was read, or are looked at otherwise."""
_DAMAGED = (OSError, EOFError, ValueError, LookupError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What numpy and zipfile raise for a file that is not whole: a wrong bit may say that it is encrypted."""


class RememberedTokenizer:
    """A tokenizer that is asked only for texts whose token ids are not known yet.

    Args:
        tokenizer: one of transformers.
        known: token ids by digest of the text, int64 ``[T]`` each; those of further texts are added.
    """

    def __init__(self, tokenizer: Any, known: dict[bytes, IntArray]) -> None:
        self._tokenizer = tokenizer
        self.known = known
        self.n_asked = 0
        """Texts that were not known."""

    def __call__(self, text: str = "", *, text_target: str | None = None) -> IntArray:
        """Token ids of a text, int64 ``[T]``; of one that is a target, if it is given as such."""
        options = {"text": text} if text_target is None else {"text_target": text_target}
        digest = blake2b(json.dumps(options).encode(), digest_size=_DIGEST).digest()
        if digest not in self.known:
            self.n_asked += 1
            self.known[digest] = np.array(self._tokenizer(**options)["input_ids"], dtype=np.int64)
        return self.known[digest]


@contextmanager
def remembered(tokenizer: Any, probe_set: ProbeSet) -> Iterator[Any]:
    """To tokenise a probe set: a tokenizer that returns what the given one does, from the disk where that is there.

    What it is asked for besides is kept when the context ends, unless that is by an exception. A file that is damaged
    is named in a warning and written anew; that none can be written is no more than logged. A tokenizer of which it is
    not known what its results depend on, and one for few texts, is used as it is.

    Args:
        tokenizer: any, or None.
        probe_set: what is to be tokenised.
    """
    directory = _directory()
    texts = (sample for sample in chain.from_iterable(probe_set.tasks.values()) if isinstance(sample, ProbeSample))
    n_texts = sum(1 + bool(sample.prompt) + len(sample.choices) for sample in texts)
    identity = _identity(tokenizer) if directory is not None and n_texts >= _WORTH else None
    if directory is None or identity is None:
        yield tokenizer
        return
    file = directory / f"{sha256(f'{identity}-{probe_set.fingerprint}'.encode()).hexdigest()}.npz"
    kept = RememberedTokenizer(tokenizer, _load(file))
    yield kept
    if kept.n_asked:
        _, error = attempt(lambda: _store(file, kept.known))
        if error is not None:
            logger.info("MUI: the tokens of the probe set are not kept in %s (%s)", file, described(error))


def _directory() -> Path | None:
    """Where files are kept; None for nowhere."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        place, _ = attempt(lambda: Path(named).expanduser())  # there may be no such user
        return None if named in ("", "off") else place
    base, _ = attempt(lambda: Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"))
    return None if base is None else base / "mui-callback" / "tokens"


def _identity(tokenizer: Any) -> str | None:
    """SHA-256 (hex) of all that the results of a tokenizer depend on; None where that is not known."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if type(tokenizer).__module__.partition(".")[0] != "transformers" or not hasattr(backend, "to_str"):
        return None
    attributes = {name: value for name, value in vars(tokenizer).items() if name not in _NO_MATTER}
    described_by = [
        _FORMAT,
        *(sys.modules[name].__version__ for name in ("transformers", "tokenizers")),
        f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
    ]
    try:  # parts written in Python are not serialised, and not every attribute is plain
        content = json.dumps([described_by, attributes, backend.to_str()], sort_keys=True, default=_plain)
    except Exception:
        return None
    return sha256(content.encode()).hexdigest()


def _plain(value: Any) -> Any:
    if type(value).__name__ == "AddedToken":
        return repr(value)
    raise TypeError(f"expected an attribute that is plain, got {type(value)}")


def _load(file: Path) -> dict[bytes, IntArray]:
    """Token ids by digest of their text; none where there is no file that is whole."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            digest_NB, length_N, ids = arrays["digest"], arrays["length"], arrays["ids"]
        are_integers = ids.dtype == length_N.dtype == np.int64
        if not are_integers or digest_NB.shape != (len(length_N), _DIGEST) or length_N.sum() != len(ids):
            raise ValueError(f"{len(digest_NB)} texts of {length_N.sum()} tokens, but {len(ids)} of {ids.dtype}")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except _DAMAGED as error:
        warn(f"MUI: {file} cannot be read, so the probe set is tokenised anew ({described(error)})")
        return {}
    parts = np.split(ids, length_N.cumsum()[:-1])
    return {digest.tobytes(): part for digest, part in zip(digest_NB, parts, strict=True)}


def _store(file: Path, known: dict[bytes, IntArray]) -> None:
    """Replaces the file at once.

    Raises:
        OSError: it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with replaced_at_once(file) as partial, partial.open("wb") as stream:
        np.savez_compressed(
            stream,
            digest=np.frombuffer(b"".join(known), dtype=np.uint8).reshape(-1, _DIGEST),
            length=np.array([len(ids) for ids in known.values()], dtype=np.int64),
            ids=np.concatenate(list(known.values())),
        )

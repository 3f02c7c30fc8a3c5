"""Text that every machine with Python has: documentation in English, the standard library's code, additions.

Each source is split into training and held-out *documents* (topics, files) before it is cut into samples, and what
is held out occurs nowhere in the training documents.
"""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from random import Random

from mui_callback.demo.arithmetic import split_additions
from mui_callback.errors import MUIError
from mui_callback.probe.samples import ProbeSample

TASKS = ("english", "code", "arithmetic")

_BYTES = range(40, 201)
"""Lengths of a sentence or a block of code."""
_HELD_OUT_DOCUMENTS = 1 / 6
_CODE_FILES = 160
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class Corpus:
    """Samples by task, to train on and to probe with; no held-out text occurs in the training part."""

    training: Mapping[str, tuple[ProbeSample, ...]]
    held_out: Mapping[str, tuple[ProbeSample, ...]]


def load_corpus(seed: int = 0, n_held_out: int = 48) -> Corpus:
    """Read this machine's texts; the same seed on the same machine gives the same corpus.

    Args:
        seed: Decides what is held out, and the order of everything.
        n_held_out: Held-out samples of each task.

    Raises:
        MUIError: This Python comes without its documentation or its sources.
    """
    random = Random(seed)
    parts = {
        "english": _split("english", _documentation(), sentences, random, n_held_out),
        "code": _split("code", _library_sources(random), code_blocks, random, n_held_out),
        "arithmetic": split_additions(random, n_held_out),
    }
    return Corpus(
        training={task: tuple(training) for task, (training, _) in parts.items()},
        held_out={task: tuple(held_out) for task, (_, held_out) in parts.items()},
    )


def sentences(text: str) -> list[str]:
    """The sentences of a document, without its lists, tables and code."""
    found = re.split(r"(?<=[.!?])\s+(?=[A-Z])|\n\n", text)
    return [sentence for sentence in found if _has_length(sentence) and _is_prose(sentence)]


def code_blocks(text: str) -> list[str]:
    """The blocks of a source file that blank lines set apart."""
    return [block for block in _paragraphs(text) if _has_length(block)]


def _documentation() -> dict[str, str]:
    return {topic: _without_line_breaks(topics[topic]) for topic in sorted(topics)}


def _without_line_breaks(text: str) -> str:
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in _paragraphs(text))


def _library_sources(random: Random) -> dict[str, str]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(_source_files(folder))
    chosen = random.sample(files, min(_CODE_FILES, len(files)))
    return {path.as_posix(): (folder / path).read_text(encoding="utf-8", errors="replace") for path in chosen}


def _source_files(folder: Path) -> Iterator[Path]:
    for here, folders, files in os.walk(folder):
        folders[:] = set(folders) - _NOT_LIBRARY
        yield from (Path(here, file).relative_to(folder) for file in files if file.endswith(".py"))


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n\s*\n", text)


def _split(
    task: str,
    documents: Mapping[str, str],
    cut: Callable[[str], list[str]],
    random: Random,
    n_held_out: int,
) -> tuple[list[ProbeSample], list[ProbeSample]]:
    names = random.sample(list(documents), len(documents))
    n_documents = round(len(names) * _HELD_OUT_DOCUMENTS)
    held_out, training = names[:n_documents], names[n_documents:]
    training_text = "\n\n".join(documents[name] for name in training)
    # Documents repeat each other: the topic "compound" contains the topic "if".
    unseen = [sample for sample in _samples(held_out, documents, cut) if sample.response not in training_text]
    if len(unseen) < n_held_out:
        raise MUIError(f"{task}: expected {n_held_out} or more samples to hold out in this Python, got {len(unseen)}")
    return _samples(training, documents, cut), random.sample(unseen, n_held_out)


def _samples(names: list[str], documents: Mapping[str, str], cut: Callable[[str], list[str]]) -> list[ProbeSample]:
    texts = {text: f"{name}-{index}" for name in names for index, text in enumerate(cut(documents[name]))}
    return [ProbeSample(id=place, response=text) for text, place in texts.items()]


def _has_length(text: str) -> bool:
    return len(text.encode()) in _BYTES


def _is_prose(sentence: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in sentence)
    return sentence[0].isupper() and sentence.endswith(".") and letters > 0.9 * len(sentence)

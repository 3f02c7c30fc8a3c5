"""What the numbers of a study depend on besides the weights, so that none are put side by side that cannot be."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mui_callback.errors import MUIError
from mui_callback.trajectory.config import ModelConfig, StudyConfig
from mui_callback.trajectory.records import Identity
from mui_callback.version import __version__

_MEASURING = (
    *(
        f"{package}/*.py"
        for package in ("benchmarks", "experts", "metrics", "parallel", "probe", "responses", "scoring")
    ),
    *("counts.py", "layout.py", "loading.py", "report.py", "rules.py", "sample_*.py", "task_report.py"),
    *(
        f"trajectory/{name}.py"
        for name in ("architecture", "divided", "measuring", "points", "rows", "state_files", "zero3")
    ),
)
"""What a number comes through, in this package."""
_NOT_MEASURED = ("batch_tokens",)
"""Settings of the probe that change no number, but for rounding."""
_SMALL = (".json", ".py", ".model", ".txt", ".jinja", ".tiktoken")
_ABSENT = object()
_OF_MODEL = ("dtype", "chat", "tokenizer", "architecture", "trust_remote_code")


def identity_of(config: StudyConfig, model: ModelConfig, tasks: Mapping[str, str]) -> Identity:
    """What the numbers of one model depend on, as JSON can hold it.

    Args:
        config: of the study.
        model: of the model.
        tasks: the fingerprint of each task: of prompts, gold responses, and how answers are generated.
    """
    probe = {name: value for name, value in asdict(config.probe).items() if name not in _NOT_MEASURED}
    return {
        "response": config.response,
        "probe": {**probe, "rules": list(config.probe.rules)},
        "lm_eval": {"tasks": sorted(config.lm_eval), "limit": config.lm_eval_limit},
        "performance": dict(config.performance),
        "model": {name: getattr(model, name) for name in _OF_MODEL} | _repository(model),
        "files": {name: _files_digest(getattr(model, name)) for name in ("architecture", "tokenizer")},
        "tasks": dict(tasks),
        "code": f"{__version__} ({_code_digest(*_MEASURING)})",
    }


def _files_digest(named: str | None) -> str | None:
    """Of what is read at a name besides the checkpoints: a config, a tokenizer, the source of a function; None where
    that is not on this machine. Weights that lie there are not read."""
    module, _, function = (named or "").partition(":")
    spec = find_spec(module) if function and "/" not in module else None
    path = Path(spec.origin) if spec is not None and spec.origin else Path(os.path.expanduser(named or ""))
    files = [path] if path.is_file() else sorted(path.glob("*.*")) if named and path.is_dir() else []
    small = [file for file in files if file.suffix in _SMALL and file.is_file()]
    content = b"".join(file.name.encode() + file.read_bytes() for file in small)
    return hashlib.sha256(content).hexdigest() if small else None


def _repository(model: ModelConfig) -> dict[str, str]:
    """That of the hub, whose weights are not looked at again; a directory may be moved, as its files are."""
    return {} if os.path.exists(os.path.expanduser(model.source)) else {"source": model.source}


def check_unchanged(directory: Path, before: Mapping[str, Identity], now: Mapping[str, Identity]) -> None:
    """To be called before a plan is replaced.

    Args:
        directory: of the study.
        before: of the models that were measured.
        now: of the models, as they would be measured now.

    Raises:
        MUIError: a model was measured otherwise; says what differs.
    """
    for model in before.keys() & now.keys():
        changes = list(_changes(before[model], now[model]))
        if changes:
            raise MUIError(
                f"{directory}: {model} was measured otherwise before ({'; '.join(changes)}), and cannot be put side by"
                " side with what would be measured now. Take another output, or measure it anew with --redo."
            )


def _changes(before: Any, now: Any, where: str = "") -> Iterator[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys((*before, *now)):
            yield from _changes(before.get(name, _ABSENT), now.get(name, _ABSENT), f"{where}.{name}".lstrip("."))
    elif _ABSENT in (before, now):
        yield f"{where} is {'new' if before is _ABSENT else 'gone'}"
    elif before != now:
        yield f"{where} was {_short(before)}, is {_short(now)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def code_of_answers() -> str:
    """Equal for equal sources of what makes the answers of a model."""
    return _code_digest("responses/*.py")


@cache
def _code_digest(*patterns: str) -> str:
    """Of files of this package."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(file for pattern in patterns for file in root.glob(pattern)):
        digest.update(f"{file.relative_to(root).as_posix()}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]

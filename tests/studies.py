"""Small studies: checkpoints of tiny models in a directory, tasks in files, and configs of them."""

from __future__ import annotations

import gc
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console
from transformers import ByT5Tokenizer

from mui_callback.responses.task_config import TaskConfig
from mui_callback.settings import ProbeSettings
from mui_callback.trajectory.config import ModelConfig, StudyConfig
from mui_callback.trajectory.run import run_study
from mui_callback.trajectory.screen import StudyOutcome
from tiny import build

SUMS = [{"prompt": f"{a}+{b}=", "response": str(a + b)} for a, b in ((2, 2), (2, 3), (1, 4), (3, 3), (5, 1))]
WORDS = [
    {"prompt": "a", "response": "b", "choices": ["b", "cd"], "answer": 0},
    {"prompt": "one", "response": "two", "choices": ["three", "two"], "answer": 1},
    {"prompt": "x", "response": "yz", "choices": ["yz", "q"], "answer": 0},
]
PROBE = ProbeSettings(rules="top_fraction=0.05")


def save_checkpoints(directory: Path, steps: Sequence[int], family: str = "qwen2_moe") -> Path:
    """Models of different weights, as transformers' Trainer leaves them."""
    for step in steps:
        path = directory / f"checkpoint-{step}"
        build(family, seed=step).save_pretrained(path)
        ByT5Tokenizer().save_pretrained(path)
    return directory


def save_tasks(directory: Path, **tasks: Sequence[Mapping[str, Any]]) -> list[TaskConfig]:
    """JSONL files, one for each task."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in tasks.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        TaskConfig(
            name, file=directory / f"{name}.jsonl", extract="number" if name == "sums" else "text", max_new_tokens=4
        )
        for name in tasks
    ]


def study(output: Path, source: Path, tasks: Sequence[TaskConfig], **options: Any) -> StudyConfig:
    """A study of all checkpoints of a directory."""
    return StudyConfig(output, [ModelConfig(str(source))], list(tasks), **{"probe": PROBE, "device": "cpu", **options})


def run(config: StudyConfig) -> tuple[StudyOutcome, str]:
    """Run a study, and return what became of it and what it said."""
    said = io.StringIO()
    gc.freeze()  # or to collect garbage after a checkpoint would take as long as to measure it, longer still in a fork
    outcome = run_study(config, Console(file=said, width=200))
    return outcome, said.getvalue()


def table(output: Path) -> list[dict[str, Any]]:
    """The rows of a study."""
    rows: list[dict[str, Any]] = pq.read_table(output / "results.parquet").to_pylist()
    return rows

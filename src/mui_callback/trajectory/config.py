"""What a study can be told: dataclasses that a file, the command line and the environment fill in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Literal

from mui_callback.responses.task_config import TaskConfig
from mui_callback.settings import ProbeSettings

Response = Literal["gold", "generate"]
Distribute = Literal["checkpoints", "samples", "weights"]


@dataclass(frozen=True)
class ModelConfig:
    """A model of a study, and which of its checkpoints are measured.

    Raises:
        ValueError: a value is out of its range.
    """

    source: str
    """A hub id; a directory that is a model, or that holds checkpoints: ``checkpoint-*`` of transformers' Trainer,
    ``*.ckpt`` of Lightning, ``global_step*`` of DeepSpeed."""
    name: str | None = None
    """In tables and figures; by default the last part of the source."""
    checkpoints: list[str] = field(default_factory=list)
    """Which ones, in this order: branches or tags on the hub, entries of a directory. Patterns such as
    ``step*-tokens*B`` stand for all that match, in the order of their steps. By default the main branch, or all
    checkpoints of a directory."""
    at_most: int | None = None
    """Of more, so many are taken, evenly spaced, the first and the last among them; of 1, the last."""
    architecture: str | None = None
    """For checkpoints that are weights only (Lightning, DeepSpeed): a directory or a hub id with the model's config, or
    ``module:function``, a function of yours without arguments that makes the model."""
    tokenizer: str | None = None
    """A directory or a hub id; by default it comes with the checkpoint or the architecture."""
    chat: bool = False
    """Put prompts into the tokenizer's chat template."""
    tokens_per_step: float | None = None
    """For labels that have steps only: the batch over all processes, in tokens."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    allow_pickle: bool = False
    """Read weights from a pickle where there are no safetensors; even then nothing but tensors is unpickled."""

    def __post_init__(self) -> None:
        if not self.source.strip():
            raise ValueError("source: expected a hub id or a path, got an empty one")
        if self.at_most is not None and self.at_most < 1:
            raise ValueError(f"at_most: expected a positive number of checkpoints, got {self.at_most}")
        if self.tokens_per_step is not None and not 0 < self.tokens_per_step < inf:
            raise ValueError(f"tokens_per_step: expected a positive number of tokens, got {self.tokens_per_step}")

    @property
    def title(self) -> str:
        """How it is called."""
        return self.name or self.source.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True)
class StudyConfig:
    """A study: models and their checkpoints, tasks, and how they are measured.

    Raises:
        ValueError: a value is out of its range, or two models or tasks have one name.
    """

    output: Path
    """Directory of the study; what is there is gone on with."""
    models: list[ModelConfig]
    """Side by side."""
    tasks: list[TaskConfig]
    """What is measured of each checkpoint."""
    name: str | None = None
    """Title of the study; by default the name of its directory."""
    response: Response = "gold"
    """What is scored: ``gold``, the responses of the tasks, by teacher forcing; ``generate``, the model's own greedy
    answers, as in arXiv 2509.23933."""
    probe: ProbeSettings = field(default_factory=ProbeSettings)
    """How."""
    lm_eval: list[str] = field(default_factory=list)
    """Tasks of lm-evaluation-harness, run on each checkpoint besides; a task of the study with the same name, or that
    `performance` names, has its score for its performance."""
    lm_eval_limit: int | None = None
    """Samples of each of them; None for all."""
    performance: dict[str, str] = field(default_factory=dict)
    """Names of scores by task, such as ``gsm8k: gsm8k/exact_match_flexible-extract``."""
    device: str = "auto"
    """That models run on: ``cpu``, ``cuda``, ``cuda:1``; auto for a GPU where there is one."""
    distribute: Distribute = "checkpoints"
    """What each process has that ``torchrun`` or ``accelerate launch`` starts: checkpoints of its own; samples of its
    own of every checkpoint; or a part of the weights of a model that is too big for one device (FSDP2), and samples."""
    keep_checkpoints: int | None = 0
    """Downloaded checkpoints that stay in the cache after they are measured, the latest ones; None for all. Weights
    that were there before the study are never deleted."""
    redo: bool = False
    """Measure anew what was measured otherwise (another probe set, threshold or version of the code)."""

    def __post_init__(self) -> None:
        if not self.models or not self.tasks:
            raise ValueError("expected one or more models and one or more tasks")
        _check_different("models", (model.title for model in self.models))
        _check_different("tasks", (task.name for task in self.tasks))
        if self.keep_checkpoints is not None and self.keep_checkpoints < 0:
            raise ValueError(f"keep_checkpoints: expected a number of at least 0, or null, got {self.keep_checkpoints}")
        if self.lm_eval_limit is not None and self.lm_eval_limit < 1:
            raise ValueError(f"lm_eval_limit: expected a positive number of samples, got {self.lm_eval_limit}")
        unknown = [task for task in self.performance if task not in {one.name for one in self.tasks}]
        if unknown:
            raise ValueError(f"performance: there is no task {unknown[0]!r}")

    @property
    def title(self) -> str:
        """How it is called."""
        return self.name or self.output.resolve().name


def _check_different(what: str, names: Iterable[str]) -> None:
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        raise ValueError(f"{what}: expected different names, got {twice[0]!r} twice")

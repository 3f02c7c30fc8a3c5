"""Which tasks of lm-evaluation-harness to run, found and loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from mui_callback.forgiving import attempt, described


@dataclass(frozen=True)
class LMEval:
    """What to run of lm-evaluation-harness, and how; a list of task names does without it.

    Raises:
        ImportError: the harness is not installed.
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of its range.
    """

    tasks: str | Sequence[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]]
    """Names of tasks, groups or tags, or paths to YAML files of tasks (groups have to be in `include_path`); as a
    mapping, by the name of their scores."""
    limit: float | None = None
    """Samples of each task; below 1, that share of them; None for all."""
    num_fewshot: int | None = None
    """Examples in the prompt; None for what the task says."""
    batch_size: int = 8
    """Requests in a forward pass; halved if memory runs out."""
    include_path: str | os.PathLike[str] | None = None
    """A folder with YAML files of more tasks and groups, which are then known by their names."""

    def __post_init__(self) -> None:
        check_installed()
        paths = self.tasks.values() if isinstance(self.tasks, Mapping) else self.tasks
        paths = [self.tasks] if isinstance(self.tasks, str) else paths
        if not isinstance(paths, Sequence | type({}.values())) or not all(
            isinstance(path, str | os.PathLike) for path in paths
        ):
            raise TypeError(f"LMEval: expected names of tasks or paths of YAML files, got {self.tasks!r:.80}")
        if not paths:
            raise ValueError("LMEval: expected one task or more, got none")
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"LMEval: expected limit to be a positive number of samples or None, got {self.limit!r}")
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise ValueError(
                f"LMEval: expected batch_size to be a positive number of requests, got {self.batch_size!r}"
            )

    @property
    def named(self) -> list[tuple[str | None, str]]:
        """The tasks, each with the name of its scores; None for its own."""
        if isinstance(self.tasks, str):
            return [(None, self.tasks)]
        if isinstance(self.tasks, Mapping):
            return [(name, os.fspath(task)) for name, task in self.tasks.items()]
        return [(None, os.fspath(task)) for task in self.tasks]

    def under(self, name: str) -> LMEval:
        """The same tasks, whose scores have this name, or begin with it where there are several."""
        tasks = self.named
        if len(tasks) == 1:
            return replace(self, tasks={name: tasks[0][1]})
        return replace(self, tasks={f"{name}/{own or Path(task).stem}": task for own, task in tasks})


def check_installed() -> None:
    """Raises ImportError where lm-evaluation-harness is not installed."""
    if find_spec("lm_eval") is None:
        raise ImportError("tasks of lm-evaluation-harness need more packages: pip install 'mui-callback[lm-eval]'")


class AskedTask(NamedTuple):
    """A task, a group or a tag that was asked for."""

    label: str | None
    """The name that its scores are given; None for its own."""
    name: str
    """Its own in the harness."""
    parts: list[str]
    """The tasks that it stands for."""


class LoadedTasks(NamedTuple):
    """Tasks with their data."""

    harness: dict[str, Any]
    """What the harness evaluates."""
    asked: list[AskedTask]


def load_tasks(options: LMEval) -> LoadedTasks:
    """Load all of them.

    Raises:
        ValueError: one is not known or cannot be loaded.
    """
    managers = _Managers(options.include_path)
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    asked: list[AskedTask] = []
    for label, name in options.named:
        try:
            loaded = managers.load(name)
        except Exception as error:
            raise ValueError(f"lm-eval: cannot load the task {name!r}: {described(error)}") from error
        parts = list(loaded["tasks"])
        asked.append(AskedTask(label, next(iter(loaded["groups"]), parts[0] if len(parts) == 1 else name), parts))
        tasks |= loaded["tasks"]
        groups |= loaded["groups"]
    for task in tasks.values():
        own = task.get_config("num_fewshot")
        if options.num_fewshot is not None and own != 0:
            task.set_config(key="num_fewshot", value=options.num_fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
    children = {name: group.child_names for name, group in groups.items()}
    return LoadedTasks({"tasks": tasks, "groups": groups, "group_map": children}, asked)


class _Managers:
    """Who knows tasks: first of the user's own alone, as to look at all that the harness has takes many seconds."""

    def __init__(self, include_path: str | os.PathLike[str] | None) -> None:
        from lm_eval.tasks import TaskManager

        self._own = TaskManager(include_path=include_path, include_defaults=False)
        self._all = cache(partial(TaskManager, include_path=include_path))

    def load(self, asked: str) -> dict[str, Any]:
        if is_path(asked):
            return dict(self._own.load([asked]))
        if asked in self._own.task_index:
            loaded, _ = attempt(lambda: self._own.load([asked]))
            if loaded is not None:  # a group of the user's may hold tasks of the harness
                return dict(loaded)
        return dict(self._all().load([asked]))


def is_path(task: str) -> bool:
    """Whether a task is named by its file."""
    return Path(task).suffix in (".yaml", ".yml")

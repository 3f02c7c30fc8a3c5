"""From the config of a study to what is to be done."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from mui_callback.responses.task import Task, read_task
from mui_callback.trajectory.config import StudyConfig
from mui_callback.trajectory.downloads import Downloads
from mui_callback.trajectory.identity import check_unchanged, identity_of
from mui_callback.trajectory.listing import StudiedCheckpoint, list_checkpoints
from mui_callback.trajectory.records import CheckpointRecord, Identity, read_plan, read_record, recorded, write_plan

_DOWNLOADS_NAME = "downloads.jsonl"


@dataclass(frozen=True)
class StudyPlan:
    """A study that is ready to run."""

    config: StudyConfig
    tasks: tuple[Task, ...]
    checkpoints: tuple[StudiedCheckpoint, ...]
    """In the order in which they are in the table."""
    identities: Mapping[str, Identity]
    """By model."""

    @classmethod
    def of(cls, config: StudyConfig) -> StudyPlan:
        """Read the tasks, and find the checkpoints; nothing is written or downloaded.

        Raises:
            MUIError: a task cannot be read, no checkpoint is found, or what was measured before was measured otherwise.
        """
        tasks = tuple(read_task(task) for task in config.tasks)
        fingerprints = {task.name: task.fingerprint(of_answers=config.response == "generate") for task in tasks}
        identities = {model.title: identity_of(config, model, fingerprints) for model in config.models}
        measured = _measured(config.output)
        downloads = Downloads(config.output / _DOWNLOADS_NAME)
        checkpoints: list[StudiedCheckpoint] = []
        for model in config.models:
            _, labels = measured.get(model.title, ({}, []))
            checkpoints += list_checkpoints(model, downloads, labels)
        if not config.redo:
            check_unchanged(config.output, {model: identity for model, (identity, _) in measured.items()}, identities)
        return cls(config, tasks, tuple(checkpoints), identities)

    def write(self) -> None:
        """Keep the plan in the directory of the study.

        Raises:
            OSError: it cannot be written.
        """
        write_plan(
            self.config.output,
            name=self.config.title,
            identities=self.identities,
            checkpoints=[one.id for one in self.checkpoints],
            config=json.loads(json.dumps(asdict(self.config), default=str)),
        )

    def record(self, checkpoint: StudiedCheckpoint) -> CheckpointRecord | None:
        """What was measured of a checkpoint as this plan says; None where nothing was."""
        found = self._found(checkpoint)
        return None if found is None or _differ(found.weights, checkpoint.place.weights) else found

    def has_other_weights(self, checkpoint: StudiedCheckpoint) -> bool:
        """Whether a checkpoint is not what it was when it was measured."""
        found = self._found(checkpoint)
        return found is not None and _differ(found.weights, checkpoint.place.weights)

    def _found(self, checkpoint: StudiedCheckpoint) -> CheckpointRecord | None:
        found = read_record(self.config.output, checkpoint.id)
        return found if found is not None and found.identity == self.identities[checkpoint.id.model] else None


def _measured(directory: Path) -> dict[str, tuple[Identity, list[str]]]:
    """By model what its numbers depend on, by the plan that is there, and the labels of its checkpoints that have
    some; models that have none are left out."""
    plan = read_plan(directory)
    found: dict[str, tuple[Identity, list[str]]] = {}
    for checkpoint, identity in recorded(directory) if plan is not None else ():
        if plan is not None and identity == plan["identities"].get(checkpoint.model):
            found.setdefault(checkpoint.model, (identity, []))[1].append(checkpoint.label)
    return found


def _differ(before: str | None, now: str | None) -> bool:
    """A checkpoint that is not there any more is taken for what it was."""
    return before is not None and now is not None and before != now

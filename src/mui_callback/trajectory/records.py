"""The directory of a study: a record of each checkpoint, written whole or not at all, and the table of all of them.

::

    study.json              the plan: checkpoints in their order, what the numbers of a model depend on, the config
    checkpoints/<slug>/     one checkpoint: record.json, and report.npz (see `MUIReport.save`)
    results.parquet         a row for each checkpoint and task, made anew from the records
    scores.parquet          a row for each checkpoint and score of lm-evaluation-harness, if any; the same
    generations/            answers that models gave, see `mui_callback.responses`
    failures.jsonl          what could not be measured, and why

Whatever is in ``checkpoints`` is complete: a directory is filled under another name and then renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mui_callback.errors import MUIError
from mui_callback.metrics.trajectory import TrajectoryPoint
from mui_callback.report import MUIReport
from mui_callback.trajectory.checkpoint import CheckpointId
from mui_callback.whole_file import remove_partial, replaced_at_once

RESULTS_NAME, SCORES_NAME = "results.parquet", "scores.parquet"
PLAN_NAME = "study.json"
CHECKPOINTS_NAME = "checkpoints"
_RECORD_NAME, _REPORT_NAME = "record.json", "report.npz"
_FORMAT = "mui-study-1"

Identity = Mapping[str, Any]
"""What the numbers of a model depend on besides its weights; all of its records in one table have the same."""
Row = dict[str, Any]
"""One checkpoint and one task, or one score: column names to plain values, None where there is no answer."""


@dataclass(frozen=True)
class CheckpointRecord:
    """What was measured of one checkpoint."""

    checkpoint: CheckpointId
    weights: str | None
    """What tells its weights from others of the same name; None where nothing did."""
    identity: Identity
    rows: Sequence[Row]
    """One for each task, in the order of the tasks."""
    points: Mapping[str | None, TrajectoryPoint]
    """Performance and MUI by task, and of all tasks pooled (None); those without an answer are left out."""
    scores: Sequence[Row]
    """Of lm-evaluation-harness, one for each."""
    seconds: Mapping[str, float]
    """What took how long: ``load``, ``generate``, ``probe``, ``evaluate``."""
    directory: Path
    """Where it is kept."""

    @cached_property
    def report(self) -> MUIReport:
        """All counts of the probe, read when they are asked for.

        Raises:
            MUIError: the file is none of a report.
            OSError: it cannot be read.
        """
        return MUIReport.load(self.directory / _REPORT_NAME)


@dataclass(frozen=True)
class Study:
    """A study as it is on the disk."""

    directory: Path
    plan: Mapping[str, Any]
    """What is to be measured: ``name``, ``identities`` by model, ``config`` and ``checkpoints``."""
    records: tuple[CheckpointRecord, ...]
    """Those that are there, in the order of the plan."""

    @property
    def name(self) -> str:
        """Title of the study."""
        return str(self.plan["name"])

    @property
    def planned(self) -> tuple[CheckpointId, ...]:
        """All checkpoints of the plan, measured or not."""
        return tuple(CheckpointId(**one) for one in self.plan["checkpoints"])

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models that have records, in the order of the plan."""
        return tuple(dict.fromkeys(record.checkpoint.model for record in self.records))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in their order."""
        return tuple(dict.fromkeys(str(row["task"]) for record in self.records for row in record.rows))

    def of(self, model: str) -> tuple[CheckpointRecord, ...]:
        """The records of one model, in their order."""
        return tuple(record for record in self.records if record.checkpoint.model == model)


def write_record(directory: Path, record: CheckpointRecord, report: MUIReport) -> None:
    """Keep what was measured of a checkpoint, which nobody else measures; a record that is there is replaced.

    Args:
        directory: of the study.
        record: whose own `directory` is not looked at.
        report: of the probe.

    Raises:
        OSError: it cannot be written.
    """
    target = directory / CHECKPOINTS_NAME / record.checkpoint.slug
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    remove_partial(target.parent, target.name)
    partial.mkdir(parents=True)
    try:
        report.save(partial / _REPORT_NAME)
        stored = {
            "format": _FORMAT,
            "checkpoint": asdict(record.checkpoint),
            "weights": record.weights,
            "identity": record.identity,
            "rows": record.rows,
            "points": [[task, point.to_dict()] for task, point in record.points.items()],
            "scores": record.scores,
            "seconds": record.seconds,
        }
        (partial / _RECORD_NAME).write_text(json.dumps(stored, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        for file in partial.iterdir():
            _sync(file)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_record(directory: Path, checkpoint: CheckpointId) -> CheckpointRecord | None:
    """What was kept of a checkpoint; None where nothing was. Its step and tokens are those that it is asked for with,
    as `ModelConfig.tokens_per_step` may say something else by then.

    Raises:
        MUIError: it is something else, or was written by another version of this format.
    """
    kept = directory / CHECKPOINTS_NAME / checkpoint.slug
    file = kept / _RECORD_NAME
    if not (file.exists() and (kept / _REPORT_NAME).exists()):
        return None
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored["format"] != _FORMAT:
            raise MUIError(f"{file}: expected format {_FORMAT!r}, got {stored['format']!r}")
        place = {"step": checkpoint.step, "tokens": checkpoint.tokens}
        return CheckpointRecord(
            checkpoint=checkpoint,
            weights=stored["weights"],
            identity=stored["identity"],
            rows=[row | place for row in stored["rows"]],
            points={task: TrajectoryPoint.from_dict(point) for task, point in stored["points"]},
            scores=[row | place for row in stored["scores"]],
            seconds=stored["seconds"],
            directory=kept,
        )
    except (ValueError, LookupError, TypeError) as error:
        raise MUIError(
            f"{file}: expected the record of a checkpoint, got something else ({error!r}). Without {kept} the"
            " checkpoint is measured anew."
        ) from error


def recorded(directory: Path) -> list[tuple[CheckpointId, Identity]]:
    """Every checkpoint that something was kept of, in whatever plan; a record that is damaged is left out."""
    found = []
    for file in sorted((directory / CHECKPOINTS_NAME).glob(f"[!.]*/{_RECORD_NAME}")):
        with suppress(ValueError, LookupError, TypeError):
            stored = json.loads(file.read_text(encoding="utf-8"))
            found.append((CheckpointId(**stored["checkpoint"]), stored["identity"]))
    return found


def write_plan(
    directory: Path,
    *,
    name: str,
    identities: Mapping[str, Identity],
    checkpoints: Sequence[CheckpointId],
    config: Mapping[str, Any],
) -> None:
    """Say what is to be measured; replaces the plan at once.

    Args:
        directory: of the study.
        name: its title.
        identities: by model.
        checkpoints: in their order.
        config: as JSON can hold it.

    Raises:
        OSError: it cannot be written.
    """
    plan = {
        "format": _FORMAT,
        "name": name,
        "identities": identities,
        "checkpoints": [asdict(one) for one in checkpoints],
        "config": config,
    }
    directory.mkdir(parents=True, exist_ok=True)
    with replaced_at_once(directory / PLAN_NAME) as partial:
        partial.write_text(json.dumps(plan, indent=1, default=str) + "\n", encoding="utf-8")


def read_plan(directory: Path) -> dict[str, Any] | None:
    """The plan of a study; None where there is none.

    Raises:
        MUIError: it is something else, or was written by another version of this format.
    """
    file = directory / PLAN_NAME
    if not file.exists():
        return None
    try:
        plan: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if plan["format"] != _FORMAT:
            raise MUIError(f"{file}: expected format {_FORMAT!r}, got {plan['format']!r}")
        _ = [plan["identities"][CheckpointId(**one).model] for one in plan["checkpoints"]]
    except (ValueError, LookupError, TypeError) as error:
        raise MUIError(f"{file}: expected the plan of a study, got something else ({error!r})") from error
    return plan


def open_study(directory: Path) -> Study:
    """Read a study as far as it is measured; records that were measured otherwise than its plan says are left out.

    Raises:
        MUIError: there is no study, or it was written by another version of this format.
    """
    plan = read_plan(directory)
    if plan is None:
        raise MUIError(f"{directory}: expected the directory of a study, with {PLAN_NAME} in it")
    found = (read_record(directory, CheckpointId(**one)) for one in plan["checkpoints"])
    there = [one for one in found if one is not None]
    records = tuple(one for one in there if one.identity == plan["identities"][one.checkpoint.model])
    return Study(directory, plan, records)


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

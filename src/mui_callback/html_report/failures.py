"""What a study could not measure."""

from __future__ import annotations

from dataclasses import dataclass

from mui_callback.trajectory.failures import read_failures
from mui_callback.trajectory.records import Study

_MOST_WORDS = 600


@dataclass(frozen=True)
class Missing:
    """A checkpoint of the plan without a record."""

    name: str
    why: str
    """Empty where nothing is said: it may still be measured."""


def missing(study: Study) -> tuple[Missing, ...]:
    """Checkpoints of the plan that are not measured, each with the last of its failures."""
    there = {record.checkpoint for record in study.records}
    reasons = read_failures(study.directory)
    return tuple(Missing(str(one), _shortened(reasons.get(one, ""))) for one in study.planned if one not in there)


def _shortened(words: str) -> str:
    return words if len(words) <= _MOST_WORDS else f"{words[:_MOST_WORDS]}…"

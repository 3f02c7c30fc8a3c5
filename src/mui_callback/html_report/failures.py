"""What a study could not measure, as far as the file that says so can be read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from mui_callback.trajectory.records import Study

_FILE_NAME = "failures.jsonl"
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
    reasons: dict[tuple[str, str], str] = {}
    try:
        lines = (study.directory / _FILE_NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        try:
            failure = json.loads(line)
        except ValueError:  # the last line of a study that was killed
            continue
        if isinstance(failure, dict):
            checkpoint = failure.get("checkpoint")
            of = checkpoint if isinstance(checkpoint, dict) else failure
            label = of.get("label", checkpoint)
            reasons[(str(of.get("model")), str(label))] = _reason(failure)
    return tuple(
        Missing(str(one), reasons.get((one.model, one.label), "")) for one in study.planned if one not in there
    )


def _reason(failure: dict[str, Any]) -> str:
    words = next((str(failure[name]) for name in ("error", "reason", "message", "why") if failure.get(name)), "failed")
    return words if len(words) <= _MOST_WORDS else f"{words[:_MOST_WORDS]}…"

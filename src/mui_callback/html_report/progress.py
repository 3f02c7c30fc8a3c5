"""How far in training a checkpoint is: in tokens where all of them say so, or else in steps, or else in their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mui_callback.trajectory.checkpoint import CheckpointId, in_tokens
from mui_callback.trajectory.records import Study


@dataclass(frozen=True)
class Progress:
    """What the checkpoints of a study are counted in."""

    kind: Literal["tokens", "steps", "checkpoints"]

    @property
    def label(self) -> str:
        """Along an axis."""
        return {"tokens": "tokens trained on", "steps": "steps", "checkpoints": "checkpoints, in order"}[self.kind]

    @property
    def counted(self) -> tuple[str, str]:
        """Before the name of one checkpoint, and of several."""
        of_kind = {"tokens": "tokens", "steps": "step", "checkpoints": "checkpoint"}
        return of_kind[self.kind], self.kind

    def at(self, checkpoint: CheckpointId, place: int) -> float:
        """Where a checkpoint is.

        Args:
            checkpoint: one of the study.
            place: among those of its model, from 0.
        """
        value = {"tokens": checkpoint.tokens, "steps": checkpoint.step, "checkpoints": place + 1}[self.kind]
        assert value is not None  # or it would be counted in something else
        return float(value)

    def words(self, value: float) -> str:
        """A place as it is written."""
        return in_tokens(value) if self.kind == "tokens" else f"{value:,.0f}"

    def phrase(self, value: float) -> str:
        """The same in a sentence."""
        if self.kind == "tokens":
            return f"{in_tokens(value)} tokens"
        return f"{self.counted[0]} {self.words(value)}"


def progress_of(study: Study) -> Progress:
    """What the records of a study are all counted in; stages of training that each begin anew are in no order of
    steps."""
    checkpoints = [record.checkpoint for record in study.records]
    if _tell_apart([(one.model, one.tokens) for one in checkpoints]):
        return Progress("tokens")
    return Progress("steps" if _tell_apart([(one.model, one.step) for one in checkpoints]) else "checkpoints")


def _tell_apart(places: Sequence[tuple[str, float | None]]) -> bool:
    """Whether all are there, and no two of a model are the same."""
    return all(value is not None for _, value in places) and len(set(places)) == len(places)

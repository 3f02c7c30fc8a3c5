"""What is remembered of a run, so that it can go on where it stopped."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from uuid import uuid4

from mui_callback.sinks.jsonl import RecordedRun
from mui_callback.spent import Spent

_COMPARED = ("tasks", "probe_set", "layers")
_INCONSEQUENTIAL = frozenset({"batch_tokens"})
"""Settings that do not change what is measured."""


@dataclass
class History:
    """The points of a run, of this process and of those before it."""

    run_id: str
    """The same in all processes that train one run, one after the other."""
    points: dict[int, dict[str, float]] = field(default_factory=dict)
    """The logged scalars by step; failed probes are not among them."""
    spent: Spent | None = None
    """What the processes before this one spent."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "run_id": self.run_id,
            "points": [[step, scalars] for step, scalars in self.points.items()],
            "spent": asdict(self.spent) if self.spent else None,
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> History:
        """From what `to_dict` gave."""
        spent = Spent(**state["spent"]) if state["spent"] else None
        return cls(state["run_id"], {int(step): dict(scalars) for step, scalars in state["points"]}, spent)


def begin(
    probed: Mapping[str, Any], start_step: int, recorded: Sequence[RecordedRun], state: Mapping[str, Any] | None
) -> History:
    """The history of a run that begins, or goes on, now.

    Args:
        probed: how it is probed now; see `RunDescription.to_dict`.
        start_step: optimizer steps done; 0 for a run that begins.
        recorded: what the record holds, of this run and of others.
        state: what a checkpoint holds: ``{"probed": …, "history": …}``.
    """
    remembered = History.from_dict(state["history"]) if state else None
    if remembered is None and (start_step == 0 or not recorded):
        return History(uuid4().hex[:12])
    run_id = remembered.run_id if remembered else recorded[-1].id
    sections = [section for section in recorded if section.id == run_id]
    before = sections[-1].probed if sections else state["probed"] if state else {}
    if changed := changes(before, probed):
        warnings.warn(
            f"MUI: training goes on at step {start_step}, but is probed in another way than before "
            f"({'; '.join(changed)}). Points before and after cannot be compared.",
            stacklevel=2,
        )
    history = History(run_id)
    if state and remembered and not changes(state["probed"], probed):
        history.points |= remembered.points
    for section in sections:
        if not changes(section.probed, probed):
            history.points |= section.points
    spent = [section.spent for section in sections] + [remembered.spent if remembered else None]
    history.spent = max((s for s in spent if s is not None), key=lambda s: s.probing, default=None)
    return history


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What makes points of two descriptions of a run incomparable, in words; empty if nothing does."""
    found = [
        f"{name} was {_short(before.get(name))}, is {_short(now.get(name))}"
        for name in _COMPARED
        if before.get(name) != now.get(name)
    ]
    old, new = before.get("settings", {}), now.get("settings", {})
    return found + [
        f"{name} was {old.get(name)}, is {new.get(name)}"
        for name in sorted(old.keys() | new.keys() - _INCONSEQUENTIAL)
        if name not in _INCONSEQUENTIAL and old.get(name) != new.get(name)
    ]


def _short(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return f"{len(value)} of {sum(layer['n_routed'] for layer in value)} experts"
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 12 else str(value)

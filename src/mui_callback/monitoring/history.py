"""What is remembered of a run, so that it can go on where it stopped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from uuid import uuid4

from mui_callback.metrics.trajectory import Trajectories, from_list, to_list
from mui_callback.sinks.record import RecordedRun
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
    trajectories: Trajectories = field(default_factory=dict)
    """What phases are called from: the last points of each task."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "run_id": self.run_id,
            "points": [[step, scalars] for step, scalars in self.points.items()],
            "spent": asdict(self.spent) if self.spent else None,
            "trajectories": to_list(self.trajectories),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> History:
        """From what `to_dict` gave.

        Raises:
            ValueError: it is something else.
        """
        try:
            spent = Spent(**state["spent"]) if state["spent"] else None
            points = {int(step): dict(scalars) for step, scalars in state["points"]}
            return cls(state["run_id"], points, spent, from_list(state.get("trajectories", [])))
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"expected the state of a monitor, as state_dict() gives it, got {state!r:.80} "
                f"({type(error).__name__}: {error})"
            ) from error


def continued(
    probed: Mapping[str, Any], start_step: int, recorded: Sequence[RecordedRun], state: Mapping[str, Any] | None
) -> tuple[History, list[str]]:
    """The history of a run that begins, or goes on, now.

    Args:
        probed: how it is probed now; see `RunDescription.to_dict`.
        start_step: optimizer steps done; 0 for a run that begins.
        recorded: what the record holds, of this run and of others.
        state: what a checkpoint holds: ``{"step": …, "probed": …, "history": …}``.

    Returns:
        The history, and what makes the points before and after incomparable, in words; empty if nothing does.

    Raises:
        ValueError: the state is none.
    """
    remembered = History.from_dict(state.get("history", state)) if state else None
    if state and not isinstance(state.get("probed"), Mapping):
        raise ValueError(f"expected the state of a monitor, as state_dict() gives it, got {state!r:.80}")
    if remembered is None and (start_step == 0 or not recorded):
        return History(uuid4().hex[:12]), []
    run_id = remembered.run_id if remembered else _run_to_go_on_with(probed, start_step, recorded).id
    sections = [section for section in recorded if section.id == run_id]
    pasts = [(section.probed, section.points, section.spent, section.trajectories) for section in sections]
    if state and remembered:
        own = (state["probed"], remembered.points, remembered.spent or Spent(), remembered.trajectories)
        pasts.insert(0, own)
    history = History(run_id)
    for before, points, spent, trajectories in pasts:
        if not _changes(before, probed):
            history.points |= points
            for task, trajectory in trajectories.items():
                history.trajectories.setdefault(task, {}).update(trajectory)
        if history.spent is None or spent.probing > history.spent.probing:
            history.spent = spent
    return history, _changes(pasts[-1][0], probed)


def _run_to_go_on_with(probed: Mapping[str, Any], start_step: int, recorded: Sequence[RecordedRun]) -> RecordedRun:
    """The last one that came so far and was probed alike, or else that came so far, or else the last one."""
    came_so_far = [run for run in recorded if any(step <= start_step for step in run.points)]
    alike = [run for run in came_so_far if not _changes(run.probed, probed)]
    return (alike or came_so_far or recorded)[-1]


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What makes points of two descriptions of a run incomparable, in words."""
    found = [
        f"{name} was {_short(before.get(name))}, is {_short(now.get(name))}"
        for name in _COMPARED
        if before.get(name) != now.get(name)
    ]
    old, new = before.get("settings", {}), now.get("settings", {})
    return found + [
        f"{name} was {old.get(name)}, is {new.get(name)}"
        for name in sorted((old.keys() | new.keys()) - _INCONSEQUENTIAL)
        if old.get(name) != new.get(name)
    ]


def _short(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        kinds = sorted({(layer["n_routed"], layer["routed_width"], *layer["shared_widths"]) for layer in value})
        return f"{len(value)} of " + " or ".join(f"{n}x{width}{list(shared) or ''}" for n, width, *shared in kinds)
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 12 else str(value)

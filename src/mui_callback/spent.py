"""The time that a training run has taken: plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Spent:
    """The time that a run has taken so far, in seconds."""

    steps: int = 0
    """Optimizer steps in `training`."""
    training: float = 0.0
    """Outside of probes."""
    probing: float = 0.0
    """In probes, everything that comes with them included."""
    last_probe: float | None = None
    """In the latest probe; None before the first one."""

    @property
    def overhead(self) -> float | None:
        """Time in probes as share of the time in training; None before the first step."""
        return self.probing / self.training if self.steps and self.training > 0 else None

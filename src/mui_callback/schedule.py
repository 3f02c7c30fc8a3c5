"""When to probe: a pure function of the step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Every so many optimizer steps, before the first one and after the last.

    Args:
        every: optimizer steps between probes.
        at_start: also at step 0, before training.
        at_end: also after the last step.

    Raises:
        ValueError: `every` is not a positive whole number.
    """

    every: int = 500
    at_start: bool = True
    at_end: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every: expected a positive number of optimizer steps, got {self.every!r}")

    def is_due(self, step: int, *, is_last: bool = False) -> bool:
        """Whether to probe after this many optimizer steps."""
        if step == 0:
            return self.at_start
        return step % self.every == 0 or (is_last and self.at_end)

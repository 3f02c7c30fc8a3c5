"""Points kept in memory."""

from __future__ import annotations

from mui_callback.sinks.base import ProbePoint, RunDescription


class MemorySink:
    """Keeps the description of the run in `run` and every point in `points`: for notebooks, and for tests."""

    def __init__(self) -> None:
        self.run: RunDescription | None = None
        self.points: list[ProbePoint] = []
        self.closed = False

    def __repr__(self) -> str:
        return f"MemorySink({len(self.points)} points, the last one: {self.points[-1] if self.points else None})"

    def open(self, run: RunDescription) -> None:
        """Keep the description."""
        self.run = run

    def write(self, point: ProbePoint) -> None:
        """Keep the point."""
        self.points.append(point)

    def close(self) -> None:
        """Note that training has ended."""
        self.closed = True

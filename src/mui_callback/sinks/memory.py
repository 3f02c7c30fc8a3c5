"""Points kept in memory."""

from __future__ import annotations

from mui_callback.sinks.base import ProbePoint


class MemorySink:
    """Keeps every point in `points`: for notebooks, and for tests."""

    def __init__(self) -> None:
        self.points: list[ProbePoint] = []
        self.closed = False

    def write(self, point: ProbePoint) -> None:
        """Keep the point."""
        self.points.append(point)

    def close(self) -> None:
        """Note that training has ended."""
        self.closed = True

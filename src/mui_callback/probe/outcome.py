"""What became of a pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mui_callback.parallel.processes import Failure
from mui_callback.report import MUIReport


@dataclass(frozen=True)
class Outcome:
    """Of a pass in all processes."""

    report: MUIReport | None = None
    """None if it failed in one of them."""
    error: Exception | None = None
    """What it failed with in this one."""
    failures: Sequence[Failure] = ()

    @property
    def is_misread(self) -> bool:
        """Whether all that went wrong is how layers were read."""
        return self.report is None and all(failure.kind == "reading" for failure in self.failures)

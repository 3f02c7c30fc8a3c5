"""What is drawn of one probe, and what becomes of it: plain data, which any thread may read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mui_callback.metrics.catalogue import PREFIX
from mui_callback.pictures.paths import Path
from mui_callback.task_report import TaskReport

Pictures = Literal["end"] | bool
"""When pictures are made: at each probe, at the last one only, or never."""


@dataclass(frozen=True)
class Scene:
    """One probe, and the way there."""

    step: int
    pooled: TaskReport
    """All tasks together."""
    tasks: Mapping[str, TaskReport]
    paths: tuple[Path, ...]
    """Of all tasks pooled, where there are several, and of each; those without a point are left out."""


@dataclass(frozen=True)
class Picture:
    """A finished picture."""

    png: bytes
    caption: str
    """What is to be seen on it, of which step and tasks."""


PICTURES = ("trajectory", "expert_mui", "activated_frequency", "top_experts", "expert_mui_histogram")
"""Every picture, by the last part of its key, in the order of their panels."""
MOST_PANELS = 9
"""Panels of one picture; of the trajectory that of all tasks pooled is one."""
PICTURE_STEP_KEY = f"{PREFIX}/pictures/step"
"""The x axis of pictures. They come when the trainer has gone on: on its axis they would take the step that sums up the
run back."""
HISTOGRAM_KEY = f"{PREFIX}/histograms/expert_mui"
"""Expert MUI of all experts, as W&B draws histograms over the steps."""
TABLE_KEY = f"{PREFIX}/tables/experts"
"""A row for each expert, at the end."""


def picture_key(name: str) -> str:
    """``mui/pictures/<name>``."""
    return f"{PREFIX}/pictures/{name}"


def check_pictures(pictures: object, tables: object) -> None:
    """Raises ValueError for what is not `Pictures`, or no flag."""
    if not isinstance(tables, bool):
        raise ValueError(f"tables: expected True or False, got {tables!r}")
    if pictures != "end" and not isinstance(pictures, bool):
        raise ValueError(f"pictures: expected True, False or 'end', got {pictures!r}")

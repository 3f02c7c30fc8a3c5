"""What is drawn of one probe, and what becomes of it: plain data, which any thread may read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mui_callback.metrics.catalogue import PREFIX
from mui_callback.pictures.paths import Path
from mui_callback.task_report import TaskReport

Pictures = Literal["probe", "end"] | bool
"""When pictures are made: True is the same as ``"probe"``."""


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


PICTURE_KEYS = {
    "expert_mui": "Expert MUI of every expert, a row for each layer, all tasks pooled; shared experts set apart",
    "activated_frequency": "The same of the activated frequency",
    "top_experts": "The ten experts with the highest activated frequency, and MUI of each",
    "trajectory": "MUI against performance: the path of each task so far and its phases",
    "expert_mui_histogram": "Histogram of expert MUI, routed and shared",
}
"""Every picture: the last part of its key, and what it is."""
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


def check_pictures(pictures: object) -> None:
    """Raises ValueError for what is not `Pictures`."""
    if pictures not in (True, False, "probe", "end") or not isinstance(pictures, bool | str):
        raise ValueError(f"pictures: expected True, False, 'probe' or 'end', got {pictures!r}")

"""Pictures and tables as W&B takes them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.util import find_spec
from io import BytesIO
from typing import Any

from mui_callback.forgiving import warn
from mui_callback.pictures.scene import HISTOGRAM_KEY, TABLE_KEY, Picture, Scene, picture_key
from mui_callback.pictures.table import expert_rows


def can_draw() -> bool:
    """Whether there is what it takes; with a warning if not."""
    try:
        import PIL.Image  # noqa: F401 - W&B needs it here
    except ImportError:
        missing = "pillow"
    else:
        missing = "" if find_spec("matplotlib") else "matplotlib"
    if missing:
        warn(
            f"MUI: there are no pictures, as {missing} cannot be imported; values are logged. "
            "pip install 'mui-callback[wandb]'"
        )
    return not missing


def as_media(scene: Scene, pictures: Mapping[str, Picture]) -> dict[str, Any]:
    """What W&B takes, by key."""
    from PIL import Image

    wandb: Any = sys.modules["wandb"]
    values = {
        picture_key(name): wandb.Image(Image.open(BytesIO(picture.png)), caption=picture.caption)
        for name, picture in pictures.items()
    }
    return {**values, HISTOGRAM_KEY: wandb.Histogram(scene.pooled.expert_mui)}


def as_table(scene: Scene) -> dict[str, Any]:
    """What W&B takes, by key."""
    columns, rows = expert_rows(scene.pooled, scene.tasks)
    return {TABLE_KEY: sys.modules["wandb"].Table(columns=columns, data=rows)}

"""The workspace: the sections of the catalogue as panels, all on the x axis of the loss."""

from __future__ import annotations

from typing import Any, Literal

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from mui_callback.metrics.sections import SECTIONS
from mui_callback.pictures.scene import PICTURES, picture_key
from mui_callback.sinks.step_keys import HF_STEP_KEY, LIGHTNING_STEP_KEY, OWN_STEP_KEY

Trainer = Literal["hf", "lightning", "loop"]
X_AXES: dict[Trainer, str] = {"hf": HF_STEP_KEY, "lightning": LIGHTNING_STEP_KEY, "loop": OWN_STEP_KEY}
"""What the losses of each trainer are plotted against."""
NAME = "MUI"

_TRAINING_LOSS = (
    r"^(((train|val|valid|validation|eval|test)[/_])+([^/]+_)?)?loss(_step|_epoch)?(/dataloader_idx_[0-9]+)?$"
)
"""As trainers name it: ``train/loss``, ``eval/gsm8k_loss``, ``val_loss/dataloader_idx_1``."""
_COLUMNS = 3


def build_workspace(entity: str, project: str, x_axis: str) -> ws.Workspace:
    """The workspace as an object of wandb-workspaces; nothing is sent.

    Whatever tasks, benchmarks and rules a run has are found by regular expressions; a panel without data stays empty.

    Args:
        entity: whose project it is.
        project: its name.
        x_axis: the metric that it is; see `X_AXES`.
    """
    loss = _line(x_axis, "Loss of the trainer", "loss", _TRAINING_LOSS)
    sections = []
    for name, panels in SECTIONS.items():
        lines = [_line(x_axis, panel.title, panel.unit, panel.regex) for panel in panels]
        if name == "Trajectory":
            lines.insert(1, loss)
        sections.append(_section(name, lines))
    pictures = [wr.MediaBrowser(media_keys=[picture_key(name)], num_columns=1) for name in PICTURES]
    sections.insert(1, _section("Pictures", pictures))
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis=x_axis),
        auto_generate_panels=False,
    )


def workspace_spec(workspace: ws.Workspace) -> dict[str, Any]:
    """What `save` would send, as JSON has it."""
    spec: dict[str, Any] = workspace._to_model().spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    return spec


def _line(x: str, title: str, unit: str, regex: str) -> Any:
    return wr.LinePlot(title=title, x=x, metric_regex=regex, title_y=unit, smoothing_type="none")


def _section(name: str, panels: list[Any]) -> Any:
    rows = -(-len(panels) // _COLUMNS)
    layout = ws.SectionLayoutSettings(columns=_COLUMNS, rows=rows)
    return ws.Section(name=name, panels=panels, is_open=name != "Cost", layout_settings=layout)

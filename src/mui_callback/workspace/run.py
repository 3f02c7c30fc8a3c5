"""`mui-callback workspace`: make the workspace in a project, or write down what it would be."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mui_callback.errors import MUIError
from mui_callback.whole_file import replaced_at_once
from mui_callback.workspace.build import NAME, build_workspace, workspace_spec

STDOUT = Path("-")
_PATIENCE = 5
"""Seconds for an answer of W&B's server, where nothing else is set; W&B's own are 19."""


def make_workspace(path: str, *, x_axis: str, record: Path | None) -> str:
    """Save the workspace as a new view of the project, or write its spec.

    Args:
        path: ``"ENTITY/PROJECT"``.
        x_axis: the metric that it is; see `X_AXES`.
        record: a file for the spec, or `STDOUT`; then no server is asked.

    Returns:
        What to print.

    Raises:
        MUIError: the path is none; nobody is logged in; there is no such project; the server does not do it.
    """
    parts = path.split("/")
    if len(parts) != 2 or not all(parts):
        raise MUIError(f"expected ENTITY/PROJECT, such as my-team/moe, got {path!r}")
    entity, project = parts
    workspace = build_workspace(entity, project, x_axis)
    if record is None:
        _check_project(entity, project)
        return f"{path} has a new saved view, {NAME}: {_save(workspace)}"
    text = json.dumps(workspace_spec(workspace), indent=2)
    if record == STDOUT:
        return text
    with replaced_at_once(record) as partial:
        partial.write_text(f"{text}\n")
    return f"The spec of the workspace: {record}"


def _check_project(entity: str, project: str) -> None:
    import wandb

    patience = int(os.environ.get("WANDB_HTTP_TIMEOUT", _PATIENCE))
    try:
        api = wandb.Api(timeout=patience)
    except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
        advice = "Run `wandb login`, or set WANDB_API_KEY, and see that the server can be reached; --json needs none."
        raise MUIError(f"W&B did not log you in. {advice}\n{error}") from error
    try:
        _ = api.project(project, entity).id
    except ValueError as error:
        if "not found" not in str(error):
            raise MUIError(f"W&B could not be asked for {entity}/{project}: {error.__cause__ or error}") from error
        missing = f"there is no project {entity}/{project} that you may see: log a run to it first, or correct its name"
        raise MUIError(missing) from error


def _save(workspace: Any) -> str:
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    try:
        return str(workspace.save().url)
    except WandbApiFailedError as error:
        raise MUIError(f"W&B did not take the workspace: {error}") from error

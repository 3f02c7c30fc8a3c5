"""The options of `mui-callback trajectory`: all keys of a study, from a file, the environment and the command line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from mui_callback.errors import MUIError
from mui_callback.trajectory.config import StudyConfig
from mui_callback.trajectory.config_file import check_config_file, nearest

_DESCRIPTION = """Measure many checkpoints, of one model or of several side by side: MUI, performance and all
else that a probe finds, a row for each checkpoint and task. Killed at any moment, the same command goes on.

The first argument is the config, a YAML file. What the command line says goes before it, and the environment
(MUI_KEEP_CHECKPOINTS for keep_checkpoints) comes after it."""


class StudyParser(ArgumentParser):  # type: ignore[misc]
    """A parser of studies, whose first argument is a config file."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            **{**options, "description": _DESCRIPTION, "default_env": True, "env_prefix": "MUI", "allow_abbrev": False}
        )
        self.usage = "%(prog)s CONFIG [--dry-run] [--KEY VALUE ...]"
        self.add_argument("--config", action="config", help="the config of the study, also as the first argument")
        self.add_argument("--dry-run", action="store_true", help="print what would be done, with sizes and cost")
        self.add_class_arguments(StudyConfig)

    def parse_known_args(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Any:
        """See `argparse.ArgumentParser.parse_known_args`; the first argument is taken for ``--config``.

        Raises:
            MUIError: there is no such option, or the config has a key that is not known.
        """
        given = list(args or ())
        if given and not given[0].startswith("-"):
            given = ["--config", *given]
        self._check(given)
        return super().parse_known_args(given, *more, **options)

    def _check(self, given: Sequence[str]) -> None:
        known = {name.removeprefix("--") for action in self._actions for name in action.option_strings}
        for place, argument in enumerate(given):
            name = argument.removeprefix("--").partition("=")[0]
            if argument.startswith("--") and name not in known:
                raise MUIError(f"unknown option --{name}; {nearest(name, sorted(known))}")
            if argument.startswith("--config"):
                file = argument.partition("=")[2] or (given[place + 1] if place + 1 < len(given) else "")
                check_config_file(Path(os.path.expanduser(file)))


def study_of(parsed: Namespace) -> StudyConfig:
    """The study that was asked for, of what was parsed and made into objects.

    Raises:
        ValueError: a value is out of its range.
    """
    return StudyConfig(**{name: value for name, value in vars(parsed).items() if name not in ("config", "dry_run")})

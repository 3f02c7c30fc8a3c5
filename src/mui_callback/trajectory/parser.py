"""The options of `mui-callback trajectory`: all keys of a study, from a file, the environment and the command line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, set_parsing_settings

from mui_callback.errors import MUIError
from mui_callback.trajectory.config import StudyConfig
from mui_callback.trajectory.config_file import check_config_file, nearest

_DESCRIPTION = """Measure many checkpoints, of one model or of several side by side: MUI, performance and all else that
a probe finds, a row for each checkpoint and task. Killed at any moment, the same command goes on. CONFIG is YAML.
Options win over it, and it wins over the environment (MUI_KEEP_CHECKPOINTS for keep_checkpoints)."""


def parse_study(arguments: Sequence[str]) -> tuple[StudyConfig, bool]:
    """Read a study from what was typed.

    Args:
        arguments: the config file, before all options that have a value, and options.

    Returns:
        The study, and whether it is only to be shown.

    Raises:
        MUIError: there is no such option, or the config has a key that is not known.
        ValueError: a value is out of its range.
        SystemExit: a value is of another type, or help was asked for.
    """
    parser = _parser()
    given = _as_options(arguments)
    _check(parser, given)
    parsed = parser.parse_args(given)
    made = vars(parser.instantiate(parsed))
    made["output"] = made["output"].expanduser()  # no shell has seen what is in a file
    return StudyConfig(**{name: made[name] for name in made if name not in ("config", "dry_run")}), bool(parsed.dry_run)


def _as_options(arguments: Sequence[str]) -> list[str]:
    """As jsonargparse knows them: a config that stands by itself, ``--redo`` without a value, dashes in names."""
    options: list[str] = []
    left = list(arguments)
    while left:
        argument = left.pop(0)
        if argument == "--redo":
            value = left.pop(0) if left and left[0].lower() in ("true", "false", "yes", "no") else "true"
            options.append(f"--redo={value}")
        elif not argument.startswith("-") and all(map(_is_switch, options)):
            options += ["--config", argument]
        else:
            options.append(argument if _is_switch(argument) else _spelled(argument))
    return options


def _is_switch(option: str) -> bool:
    """Whether what follows an option is not its value."""
    return option.partition("=")[0] == "--dry-run" or option.startswith("--redo=")


def _spelled(argument: str) -> str:
    """As the file has it: ``--keep-checkpoints`` as ``--keep_checkpoints``."""
    name, has_value, value = argument.partition("=")
    if not name.startswith("--"):
        return argument
    return name[:2] + name[2:].replace("-", "_") + has_value + value


def _parser() -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # what stands below each field
    parser = ArgumentParser(
        prog="mui-callback trajectory",
        usage="%(prog)s CONFIG [--dry-run] [--KEY VALUE ...]",
        description=_DESCRIPTION,
        default_env=True,
        env_prefix="MUI",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="the config of the study, also as the first argument")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, with sizes and cost")
    parser.add_class_arguments(StudyConfig)
    return parser


def _check(parser: ArgumentParser, given: Sequence[str]) -> None:
    known = {name.removeprefix("--") for action in parser._actions for name in action.option_strings}
    for place, argument in enumerate(given):
        name = argument.removeprefix("--").partition("=")[0]
        if argument.startswith("--") and name not in known:
            raise MUIError(f"unknown option --{name}; {nearest(name, sorted(known))}")
        if argument.startswith("--") and name == "config":
            file = argument.partition("=")[2] or "".join(given[place + 1 : place + 2])
            check_config_file(Path(os.path.expanduser(file)))

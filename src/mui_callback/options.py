"""Options as people type them: ``--like-this``, switches without a value, and several files after one name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser


class OptionParser(ArgumentParser):  # type: ignore[misc]
    """A parser whose options have dashes, whose switches need no ``true``, and whose lists are of files."""

    def __init__(self, *args: Any, **options: Any) -> None:
        # An abbreviation must not turn --trust into --trust-remote-code.
        super().__init__(*args, **{**options, "allow_abbrev": False})

    def add_argument(self, *names: Any, **options: Any) -> Any:
        """See `argparse.ArgumentParser.add_argument`."""
        if names and str(names[0]).startswith("--"):
            names = tuple(name.replace("_", "-") for name in names)
            if any(name.endswith("+") for name in names):  # jsonargparse's own way to make a list, one value at a time
                names = tuple(name for name in names if not name.endswith("+"))
                files = {"type": Path, "nargs": "+", "metavar": "FILE"}
                options = {name: value for name, value in options.items() if name != "action"} | files
            if options.get("type") is bool and options.get("default") is False:
                options = {**options, "action": "store_true"}
                del options["type"]
        return super().add_argument(*names, **options)

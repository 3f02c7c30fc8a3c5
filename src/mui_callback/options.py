"""Options as people type them: ``--like-this``, and switches without a value."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser


class OptionParser(ArgumentParser):  # type: ignore[misc]
    """A parser whose options have dashes, and whose switches (false by default) need no ``true``."""

    def __init__(self, *args: Any, **options: Any) -> None:
        # An abbreviation must not turn --trust into --trust-remote-code.
        super().__init__(*args, **{**options, "allow_abbrev": False})

    def add_argument(self, *names: Any, **options: Any) -> Any:
        """See `argparse.ArgumentParser.add_argument`."""
        if names and str(names[0]).startswith("--"):
            names = tuple(name.replace("_", "-") for name in names)
            if options.get("type") is bool and options.get("default") is False:
                options = {**options, "action": "store_true"}
                del options["type"]
        return super().add_argument(*names, **options)

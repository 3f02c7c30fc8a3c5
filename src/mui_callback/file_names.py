"""Names of files from names that people gave."""

from __future__ import annotations

import re


def plain_name(name: str, most: int) -> str:
    """A readable name that any file system takes; different names may become one, which a digest can tell apart.

    Args:
        name: anything.
        most: characters that are kept.
    """
    return re.sub(r"[^A-Za-z0-9.=_-]+", "-", name).strip("-.")[:most]

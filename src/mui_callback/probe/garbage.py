"""Python's garbage collector, which stops a process for as long as it looks at all of its objects.

A training has a million of them, which takes tens of milliseconds; where processes wait for each other in every layer,
all stand still for as long. During a pass only the objects that it makes itself are looked at.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def old_objects_set_aside() -> Iterator[None]:
    """Objects that are there already are not looked at inside.

    Where some were set aside before, nothing is done: they could not be told from these afterwards.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()

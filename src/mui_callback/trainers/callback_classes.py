"""The classes that trainers want a callback to be of."""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Callback
    from transformers import TrainerCallback

    class TrainerClasses(TrainerCallback, Callback):
        """For type checkers, a callback is of all of them."""
else:
    TrainerClasses = object

_CLASSES = (
    ("transformers", "TrainerCallback"),
    ("lightning.pytorch", "Callback"),
    ("pytorch_lightning", "Callback"),
)

_PLAIN = "_plain_class"


def with_trainer_classes(own: type) -> type:
    """A class derived from `own` and from the callback classes of all trainers that are imported.

    Whoever makes a callback has imported the trainer that it is for; to import the others for it would take seconds.
    """
    loaded = [(sys.modules.get(module), name) for module, name in _CLASSES]
    wanted = tuple(getattr(module, name) for module, name in loaded if module is not None)
    return _derived(own, tuple(base for base in wanted if not issubclass(own, base)))


def plain_class(derived: type) -> type:
    """What `with_trainer_classes` was given."""
    plain: type = vars(derived).get(_PLAIN, derived)
    return plain


@cache
def _derived(own: type, bases: tuple[type, ...]) -> type:
    if not bases:
        return own
    return type(own.__name__, (own, *bases), {"__module__": own.__module__, "__doc__": own.__doc__, _PLAIN: own})

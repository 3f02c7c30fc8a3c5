"""To try, and to say what failed, without an exception in either."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import TypeVar

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


def attempt(action: Callable[[], _T]) -> tuple[_T | None, Exception | None]:
    """What an action returns, and what it raises."""
    try:
        return action(), None
    except Exception as error:
        return None, error


def described(error: BaseException) -> str:
    """An exception in a line: its class and what it says, if it can."""
    text, _ = attempt(lambda: str(error))
    return f"{type(error).__name__}: {text}"


def in_a_line(error: BaseException) -> str:
    """What an exception says, without the breaks of its lines; its class where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def warn(message: str) -> None:
    """A warning that stays one where warnings are turned into errors."""
    try:
        warnings.warn(message, stacklevel=2)
    except Warning:
        logger.warning(message)

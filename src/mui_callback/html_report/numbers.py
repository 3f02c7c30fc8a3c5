"""Numbers as people read them."""

from __future__ import annotations

from mui_callback.metrics.catalogue import CATALOGUE

NONE = "\N{EN DASH}"
"""Where there is no value."""
_SHARES = frozenset(metric.name for metric in CATALOGUE if metric.unit == "share")


def is_share(name: str) -> bool:
    """Whether a column is a share, which is written in percent."""
    return name.removesuffix("_low").removesuffix("_high") in _SHARES


def percent(value: float | None, digits: int = 3) -> str:
    """A share, such as ``38.5 %``."""
    return NONE if value is None else f"{_plain(100 * value, digits)} %"


def number(value: float | None, digits: int = 4) -> str:
    """A number with so many digits, never in powers of ten unless it is tiny."""
    return NONE if value is None else _plain(value, digits)


def performance(value: float, axis: str) -> str:
    """A performance with its unit, as far as it has one."""
    name = axis.removeprefix("-")
    if name == "loss":
        return f"{_plain(value, 4)} nats"
    return percent(value) if is_share(name) or (0 <= value <= 1) else number(value)


def _plain(value: float, digits: int) -> str:
    if value == 0:
        return "0"
    text = f"{value:#.{digits}g}"
    if "e" not in text:
        return text.removesuffix(".")
    return f"{value:,.0f}" if abs(value) >= 1 else f"{value:.{digits}g}"

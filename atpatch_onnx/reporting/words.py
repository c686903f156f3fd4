"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Iterable


def percent(share: float, digits: int = 1) -> str:
    """A share as percent, with a narrow no-break space."""
    return f"{100 * share:.{digits}f}\u202f%"


def count(number: int, what: str) -> str:
    """A number of things."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def size(number: int) -> str:
    """Bytes in units that people compare."""
    value = float(number)
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:.{0 if unit == 'bytes' else 1}f}\N{NO-BREAK SPACE}{unit}"
        value /= 1000
    return f"{value:.1f}\N{NO-BREAK SPACE}GB"


def listed(items: Iterable[object], most: int = 8) -> str:
    """Some items, and how many more there are."""
    words = [str(item) for item in items]
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more

"""How long steps say how far they are."""

from __future__ import annotations

from collections.abc import Callable

Tick = Callable[[int], object]
"""Called with each advance, in the units of its step."""


class Progress:
    """Told of every long step; this one keeps silent."""

    def start(self, what: str, total: int) -> Tick:
        """Begin the step `what` of `total` units."""
        del what, total
        return lambda _: None


SILENT = Progress()

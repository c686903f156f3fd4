"""Delta debugging: the smallest part of a whole that still does what the whole does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

T = TypeVar("T")


def ddmin(whole: Sequence[T], holds: Callable[[Sequence[T]], bool]) -> list[T]:
    """A 1-minimal part of `whole` for which `holds` is true: no element can be left out alone.

    `holds` must be true of the whole; it is asked again for parts it has been asked before, and is
    never asked for nothing.

    Source: the ddmin algorithm of Zeller and Hildebrandt, Simplifying and Isolating
    Failure-Inducing Input, IEEE TSE 28(2), 2002.
    """
    part, pieces = list(whole), 2
    while len(part) >= 2:
        chunks = _split(part, min(pieces, len(part)))
        complements = [_without(chunks, index) for index in range(len(chunks))]
        smaller = next((chunk for chunk in chunks if holds(chunk)), None)
        if smaller is not None:
            part, pieces = smaller, 2
            continue
        # With two chunks, complements are the chunks again.
        rest = next((c for c in complements if len(chunks) > 2 and holds(c)), None)
        if rest is not None:
            part, pieces = rest, max(pieces - 1, 2)
        elif pieces < len(part):
            pieces = min(2 * pieces, len(part))
        else:
            break
    return part


def _split(whole: Sequence[T], pieces: int) -> list[list[T]]:
    """Consecutive chunks whose sizes differ by at most one."""
    bounds = [round(index * len(whole) / pieces) for index in range(pieces + 1)]
    return [list(whole[start:end]) for start, end in pairwise(bounds)]


def _without(chunks: list[list[T]], left_out: int) -> list[T]:
    return [item for index, chunk in enumerate(chunks) if index != left_out for item in chunk]

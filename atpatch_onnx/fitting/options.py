"""What the command line says of detectors that look at several sites."""

from __future__ import annotations

from typing import Any

from ..errors import InputError
from ..passes.visual_ratio import Statistic
from .cleansight import CleanSight
from .heads import Heads
from .several import ALIGNMENT, CLEANSIGHT, SIMILARITY

_OF = {
    CLEANSIGHT: ("visual", "prompt", "statistics", "tau", "rerun"),
    SIMILARITY: ("heads", "similarity", "rerun", "scores"),
    ALIGNMENT: ("heads", "similarity", "rank", "scores"),
}
"""The options of each kind."""


def options_of(kind: str | None, **given: Any) -> CleanSight | Heads | None:
    """The options that were given, by their names on the command line; None: of no such kind.

    Raises: InputError for one that does not go with the kind, or has no such value.
    """
    said = {name: value for name, value in given.items() if value not in (None, False)}
    foreign = [name for name in said if name not in _OF.get(kind or "", ())]
    if foreign:
        kinds = [known for known, names in _OF.items() if foreign[0] in names]
        raise InputError(
            f"--{foreign[0]} goes with --kind {' or '.join(kinds)}"
            f"{'' if kind is None else f', not {kind}'}: leave it out, or choose that kind"
        )
    if kind == CLEANSIGHT:
        return _cleansight(said) if "visual" in said else None
    if kind in (SIMILARITY, ALIGNMENT):
        return _heads(said)
    return None


def _cleansight(said: dict[str, Any]) -> CleanSight:
    if "statistics" in said:
        words = [word.strip() for word in said["statistics"].split(",")]
        unknown = [word for word in words if word not in list(Statistic)]
        if unknown:
            raise InputError(
                f"--statistics {unknown[0]}: choose of {', '.join(Statistic)}, separated by commas"
            )
        said = {**said, "statistics": tuple(map(Statistic, words))}
    return CleanSight(**said)


def _heads(said: dict[str, Any]) -> Heads:
    heads = said.pop("heads", None)
    if heads is None:
        return Heads(**said)
    if heads.isdecimal():
        return Heads(count=int(heads), **said)
    return Heads(heads=tuple(word.strip() for word in heads.split(",")), **said)

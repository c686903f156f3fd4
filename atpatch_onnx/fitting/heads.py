"""Which heads: what a user may say of them, and how they are named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..passes.head_maps import CLOSEST, SIMILARITIES, WITHOUT_SINKS

Head = tuple[str, int]
"""A head by the name of its site and its index there."""


@dataclass(frozen=True)
class Heads:
    """What may be asked of the detector and of the repair of anomalous heads.

    heads: the suspicious heads, as `site:head`; else they are found.
    similarity: which of `SIMILARITIES` tells how alike heads are. The default has told bad inputs
        from clean ones best; "mean" is the plainest reading of what the paper observes.
    count: how many are taken of those found; None: as many as heal the debugging set.
    rank: of the repair at each site; None: what heals best.
    ridge: weight of the penalty on the repair, relative to the mean square of the contexts.
    scores: the output with class scores, where the model has several that could be.
    rerun: whether flagged inputs may be run again with heads replaced at every site; else they
        are replaced in flow, at the last site that is looked at.
    """

    heads: tuple[str, ...] = ()
    similarity: str = CLOSEST + WITHOUT_SINKS
    count: int | None = None
    rank: int | None = None
    ridge: float = 1e-2
    scores: str | None = None
    rerun: bool = False

    def __post_init__(self) -> None:
        """Raises: InputError for numbers that cannot be."""
        if self.similarity not in SIMILARITIES:
            raise InputError(
                f"the similarity '{self.similarity}' is none: choose {', '.join(SIMILARITIES)}"
            )
        for name, value in (("number of heads", self.count), ("rank", self.rank)):
            if value is not None and value < 1:
                raise InputError(f"the {name} is {value}: give at least 1")
        if not self.ridge > 0:
            raise InputError(f"the ridge is {self.ridge:g}: give a number above 0")


def named_heads(names: Iterable[str], known: Mapping[str, int]) -> list[Head]:
    """The heads that `site:head` names; known: how many heads each site has. Raises: InputError."""
    found = []
    for name in names:
        site, _, number = name.rpartition(":")
        if site not in known:
            raise InputError(
                f"the head '{name}' is at no site that can be used: name it as site:head, the site "
                f"one of {', '.join(known)}"
            )
        if not number.isdecimal() or int(number) >= known[site]:
            raise InputError(
                f"the head '{name}': the site '{site}' has the heads 0 to {known[site] - 1}"
            )
        found.append((site, int(number)))
    return list(dict.fromkeys(found))


def head_names(heads: Iterable[Head]) -> list[str]:
    """Heads as `site:head`."""
    return [f"{site}:{head}" for site, head in heads]


def head_mask(heads: Iterable[Head], known: Mapping[str, int]) -> NDArray[np.bool_]:
    """Heads as bool `[S, H]`, in the order of `known`, which says how many each site has."""
    sites = list(known)
    mask = np.zeros((len(sites), max(known.values())), bool)
    for site, head in heads:
        mask[sites.index(site), head] = True
    return mask

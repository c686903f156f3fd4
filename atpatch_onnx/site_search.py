"""Which sites to patch: the smallest set that still heals a debugging set.

Fewer sites mean fewer false alarms and less overhead, and which sites matter differs from model to
model: the first for a vision model that mixes patches, the last for a classifier that reads [CLS].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .classifier import Classifier
from .debugging_set import DebuggingSet
from .delta_debugging import ddmin
from .errors import RefusedError
from .model_file import ModelFile
from .progress import Tick

MOST_INPUTS = 256
"""Of a larger debugging set, as many inputs are tried, chosen at random."""
TOLERANCE = 0.01
"""How much worse than with all sites a smaller set may be, as a share of the debugging set."""
HEALING = 0.1
"""By how much the badness must fall with all sites patched. It need not vanish: a search finds
weak triggers too, and some inputs are answered wrongly whatever is in them."""

Patched = Callable[[Sequence[str]], ModelFile]
"""The model with a patch at the sites of those names."""


@dataclass
class SiteSearch:
    """What was searched and found.

    measure: what badness is; before, whole, badness: the badness of the original, with all sites
    patched, and with those chosen; tests: each set that was tried, with its badness.
    """

    measure: str
    inputs: int
    before: float
    whole: float = 1.0
    chosen: list[str] = field(default_factory=list)
    tests: list[tuple[tuple[str, ...], float]] = field(default_factory=list)

    @property
    def badness(self) -> float:
        """With the chosen sites patched."""
        return dict(self.tests)[tuple(self.chosen)]

    def notes(self) -> list[str]:
        """The search in words, for a plan file."""
        lines = [
            f"sites chosen by delta debugging on {self.inputs} bad inputs; {self.measure}: "
            f"{self.before:.1%} in the original, {self.whole:.1%} with all sites patched, "
            f"{self.badness:.1%} with those chosen; sets tried:"
        ]
        return lines + [f"  {badness:6.1%}  {', '.join(names)}" for names, badness in self.tests]


def search_sites(
    original: ModelFile,
    names: Sequence[str],
    patched: Patched,
    bad: DebuggingSet,
    provider: str,
    tick: Tick,
) -> SiteSearch:
    """The smallest set of the sites `names` that still heals `bad`.

    Raises: RefusedError if not even all of them do.
    """
    if bad.count > MOST_INPUTS:
        chosen = np.random.default_rng(0).permutation(bad.count)[:MOST_INPUTS]
        bad = bad.take(np.sort(chosen))
    badness, measure = badness_on(bad, Classifier(original, provider))
    search = SiteSearch(measure, bad.count, badness(Classifier(original, provider)))
    known: dict[tuple[str, ...], float] = {}

    def test(subset: Sequence[str]) -> float:
        key = tuple(subset)
        if key not in known:
            known[key] = badness(Classifier(patched(key), provider))
            search.tests.append((key, known[key]))
            tick(1)
        return known[key]

    search.whole = test(names)
    if search.before - search.whole < HEALING:
        raise RefusedError(
            f"patching all sites does not heal the debugging set ({measure}: "
            f"{search.before:.1%} before, {search.whole:.1%} after): fit another detector, or "
            "choose the sites yourself with --sites"
        )
    limit = search.whole + TOLERANCE
    search.chosen = ddmin(names, lambda subset: test(subset) <= limit)
    return search


def badness_on(
    bad: DebuggingSet, original: Classifier
) -> tuple[Callable[[Classifier], float], str]:
    """How bad a model is on the debugging set, 0..1, and what that means. Raises: RefusedError."""
    if bad.about.get("kind") == "protected" and bad.clean is not None:
        twins = bad.clean

        def unfair(model: Classifier) -> float:
            return _share(model.predictions(bad.bad) != model.predictions(twins))

        return unfair, "answers that change with the protected attribute"
    if bad.labels is not None:
        labels = bad.labels
        return lambda model: _share(model.predictions(bad.bad) != labels), "wrong answers"
    if bad.target is not None:
        return (
            lambda model: _share(model.predictions(bad.bad) == bad.target),
            f"inputs sent to class {bad.target}",
        )
    if bad.clean is not None:
        wanted = original.predictions(bad.clean)
        return (
            lambda model: _share(model.predictions(bad.bad) != wanted),
            "answers other than for the clean twin",
        )
    raise RefusedError(
        "nothing says what the bad inputs should be answered: add 'target', 'labels' or clean "
        "twins to the debugging set, or choose the sites yourself"
    )


def _share(wrong: NDArray[np.bool_]) -> float:
    return float(wrong.mean()) if len(wrong) else 0.0

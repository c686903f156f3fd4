"""Which heads to replace or to repair: ranked by similarity and importance, tried on bad inputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ..data import Samples
from ..debugging_set import DebuggingSet
from ..passes.head_maps import NormalSite
from .head_importance import HeadTrial, healed, importance
from .heads import Head, Heads, head_names, named_heads
from .job import Job

MOST = 32
"""So many of the heads that have risen most are tried one by one."""
LOOKED_AT, TRIED = 64, 256
"""How many bad inputs the importance of a head, and a set of heads, is measured on."""
WORSE = 0.02
"""Fewer heads are taken where they heal at most this share of inputs less than more do."""


@dataclass(frozen=True)
class Trial:
    """What replacing some heads did: share of bad inputs healed, of clean answers kept."""

    heads: list[str]
    healed: float
    agreement: float


@dataclass(frozen=True)
class Suspicious:
    """The heads to change, all that were ranked, and what a record says of how they were found."""

    heads: list[Head]
    ranked: list[Head]
    record: dict[str, object]


def suspicious_heads(
    job: Job,
    sites: Sequence[NormalSite],
    rises: Mapping[Head, float],
    clean: Samples,
    bad: DebuggingSet,
    options: Heads,
    places: Collection[str] | None = None,
) -> Suspicious:
    """The heads to replace or to repair.

    rises: how much more alike to others each head is in bad inputs than in clean ones, in spreads.
    places: the names of sites of which one has all heads; None: they may be at any.
    Raises: InputError for heads that are not there.
    """
    known = {site.name: site.heads for site in sites}
    if options.heads:
        named = named_heads(options.heads, known)
        return Suspicious(named, named, {"suspicious": head_names(named)})
    trial = HeadTrial(job, sites, options.scores)
    generator = job.generator()
    few = bad.take(np.sort(generator.permutation(bad.count)[:LOOKED_AT]))
    allowed = [head for head in rises if places is None or head[0] in places]
    risen = sorted(allowed, key=lambda head: -rises[head])[:MOST]
    falls = importance(trial, few, risen, trial.log_probabilities(few.bad, []))
    important = sorted(risen, key=lambda head: -falls[head])
    ranked = sorted(risen, key=lambda head: risen.index(head) + important.index(head))
    tried = bad.take(np.sort(generator.permutation(bad.count)[:TRIED]))
    some = clean.take(np.sort(generator.permutation(clean.count)[:TRIED]))
    orders = [ranked]
    if places is not None:
        by_site = [[head for head in ranked if head[0] == place] for place in places]
        orders = [order for order in by_site if order]
    tries = _Tries(trial, tried, some)
    best = [tries.best(order, options.count) for order in orders]
    chosen, result = max(best, key=lambda pair: pair[1].healed)
    record: dict[str, object] = {
        "ranking": [
            {"head": name, "rise": rises[head], "importance": falls[head]}
            for name, head in zip(head_names(ranked), ranked, strict=True)
        ],
        "trials": [asdict(trial) for trial in tries.made],
        "chosen": asdict(result),
        "suspicious": head_names(chosen),
    }
    return Suspicious(chosen, ranked, record)


def prefixes(count: int) -> list[int]:
    """1, 2, 4, 8 .. and `count`, at most `MOST`."""
    count = min(count, MOST)
    return [*(1 << power for power in range((count - 1).bit_length())), count]


class _Tries:
    """Sets of heads that were replaced, and what that did to bad and to clean samples."""

    def __init__(self, trial: HeadTrial, bad: DebuggingSet, clean: Samples) -> None:
        self.trial, self.bad, self.clean = trial, bad, clean
        self.made: list[Trial] = []
        self._bad, self._clean = (trial.log_probabilities(s, []) for s in (bad.bad, clean))

    def best(self, order: Sequence[Head], count: int | None) -> tuple[list[Head], Trial]:
        """The shortest beginning of `order` that heals nearly as much as any, or its `count`."""
        sizes = prefixes(len(order)) if count is None else [min(count, len(order))]
        found = [(list(order[:size]), self._try(order[:size])) for size in sizes]
        most = max(trial.healed for _, trial in found)
        return next(pair for pair in found if pair[1].healed >= most - WORSE)

    def _try(self, heads: Sequence[Head]) -> Trial:
        after = self.trial.log_probabilities(self.bad.bad, heads)
        kept = self.trial.log_probabilities(self.clean, heads)
        share = healed(self._bad, after, self.bad).mean()
        agreement = (kept.argmax(axis=1) == self._clean.argmax(axis=1)).mean()
        self.made.append(Trial(head_names(heads), float(share), float(agreement)))
        return self.made[-1]

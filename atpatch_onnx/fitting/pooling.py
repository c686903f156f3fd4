"""Against what a column's distance from normal is measured: chosen by what tells bad columns.

Where clean inputs hardly vary, as at the margin of handwritten digits, the few that do are many
standard deviations away, and such positions spend the false-positive budget of the whole map. A
spread that all positions share has no such tail, but hides what is odd at a calm position. Which
holds differs by model, by site and by feature; bad inputs tell.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..data import Samples
from ..debugging_set import DebuggingSet
from .job import Job
from .labelling import over_attended
from .statistics import UNSEEN, FeatureReader, FloatArray, Whitening, in_tails, standardised

POOLED = (0.0, 0.5, 1.0)
"""Shares of a spread's variance that all positions of the site have in common."""


def whiten_apart(job: Job, reader: FeatureReader, clean: Samples, bad: DebuggingSet) -> Whitening:
    """What is normal, each feature of each site on the scale that sets most bad columns apart.

    Set apart is a column that is further away than any of 99 clean inputs in 100 has one. Where
    scales are even, or no column is bad, it is that of the single position.
    """
    own = standardised(reader, clean)
    scales = in_tails(reader, clean, [pooled(own, share) for share in POOLED])
    apart: dict[str, list[NDArray[np.bool_]]] = {site.name: [] for site in job.sites}
    start = 0
    for values in reader.over(bad.bad):
        size = next(iter(values.values())).size
        marked = bad.marked(start, size)
        start += size
        for site in job.sites:
            found = values[site.name]
            anomalous = over_attended(scales[0], site, found, marked)
            by_column = [s.whitened(site.name, found).transpose(0, 2, 1) for s in scales]
            apart[site.name].append(np.stack([value[anomalous] > 1 for value in by_column]))
    spread = {}
    for name, parts in apart.items():
        columns = np.concatenate(parts, axis=1)  # [scales, columns, F]
        best = columns.sum(axis=1).argmax(axis=0)
        spread[name] = np.stack([scales[s].spread[name][f] for f, s in enumerate(best)])
    return replace(own, spread=spread)


def pooled(whitening: Whitening, share: float) -> Whitening:
    """With that share of each variance from the mean over positions that were seen."""
    return replace(
        whitening,
        spread={
            name: _pooled(spread, whitening.mean[name][0] < UNSEEN, share)
            for name, spread in whitening.spread.items()
        },
    )


def _pooled(spread: FloatArray, seen: NDArray[np.bool_], share: float) -> FloatArray:
    variance = np.square(spread)
    common = variance[:, seen].mean(axis=1, keepdims=True)
    return np.where(seen, np.sqrt((1 - share) * variance + share * common), spread)

"""One threshold for all sites: what is normal differs, and some sites say nothing.

A detector that was trained gives each site logits of its own spread. They are brought to one scale
on clean inputs; sites at which the bad columns hardly rise above clean ones only spend the
false-positive budget and are left out.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from ..data import Samples
from ..debugging_set import DebuggingSet
from ..passes.column_net import Levels
from .job import Job
from .labelling import over_attended
from .scores import Scorer
from .statistics import FeatureReader, Whitening

TAIL = 0.99
"""A logit at this quantile of the largest of clean inputs counts as 1, the median one as 0."""
LEAST = 1.0
"""Least distance between the two, in logits: nets are flat where everything is normal."""
USEFUL = 0.2
"""Least share of a site's anomalous columns above that quantile."""


def level(
    job: Job,
    whitening: Whitening,
    build: Callable[[Levels, NDArray[np.int64]], ModelProto],
    clean: Samples,
    bad: DebuggingSet,
) -> tuple[ModelProto, NDArray[np.int64]]:
    """The detector at the useful sites, and their indices in `job.sites`.

    build: makes the detector from the levels of some sites and the indices of these.
    """
    every = np.arange(len(job.sites))
    neutral = Levels(np.zeros(len(every), np.float32), np.ones(len(every), np.float32))
    scorer = Scorer(job, build(neutral, every))
    largest = np.stack([logits(v) for v in scorer.largest_by_site(clean).values()])  # [S, N]
    middle = np.median(largest, axis=1)
    spread = np.maximum(np.quantile(largest, TAIL, axis=1) - middle, LEAST)
    found = _anomalous_logits(job, whitening, scorer, bad)
    above = np.array(
        [
            float(((logit - m) / s > 1).mean()) if len(logit) else 0.0
            for logit, m, s in zip(found, middle, spread, strict=True)
        ]
    )
    kept = np.flatnonzero(above >= min(USEFUL, above.max()))
    levels = Levels(middle.astype(np.float32)[kept], (1 / spread).astype(np.float32)[kept])
    return build(levels, kept), kept


def logits(anomaly: NDArray[np.floating]) -> NDArray[np.float64]:
    """The logits x of anomalies (1 + x / (1 + |x|)) / 2."""
    signed = 2 * anomaly.astype(np.float64) - 1
    found: NDArray[np.float64] = signed / np.maximum(1 - np.abs(signed), 1e-9)
    return found


def _anomalous_logits(
    job: Job, whitening: Whitening, scorer: Scorer, bad: DebuggingSet
) -> list[NDArray[np.float64]]:
    """The logits of the anomalous columns of bad inputs at each site."""
    reader = FeatureReader(job, whitening.features)
    found: list[list[NDArray[np.float64]]] = [[] for _ in job.sites]
    start = 0
    for values, anomalies in zip(reader.over(bad.bad), scorer.over(bad.bad), strict=True):
        size = next(iter(values.values())).size
        marked = bad.marked(start, size)
        start += size
        for site, logit in zip(job.sites, found, strict=True):
            anomalous = over_attended(whitening, site, values[site.name], marked)
            logit.append(logits(anomalies[site.name].reshape(anomalous.shape)[anomalous]))
    return [np.concatenate(parts) for parts in found]

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

TAIL, END = 0.9, 0.99
"""The tail of a site's largest logits of clean inputs begins at the first quantile, which counts as
0, and its mean length beyond, as of an exponential distribution, counts as 1. The second is where
bad columns should be above."""
LEAST = 0.05
"""Least length of a tail, in logits: nets are flat where everything is normal."""
USEFUL = 0.75
"""A site is kept if this share of what the best site finds of its bad columns is found there."""


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
    start = np.quantile(largest, TAIL, axis=1)
    length = np.array([_excess(site, s) for site, s in zip(largest, start, strict=True)])
    end = np.quantile(largest, END, axis=1)
    found = _anomalous_logits(job, whitening, scorer, bad)
    above = np.array([_share_above(logit, e) for logit, e in zip(found, end, strict=True)])
    kept = np.flatnonzero(above >= USEFUL * above.max())
    levels = Levels(start.astype(np.float32)[kept], (1 / length).astype(np.float32)[kept])
    return build(levels, kept), kept


def _excess(largest: NDArray[np.float64], start: float) -> float:
    """The mean of what lies beyond `start`."""
    beyond = largest[largest > start] - start
    return max(float(beyond.mean()) if len(beyond) else 0.0, LEAST)


def _share_above(logits_of_bad: NDArray[np.float64], end: float) -> float:
    return float((logits_of_bad > end).mean()) if len(logits_of_bad) else 0.0


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

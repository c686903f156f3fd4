"""Labelled columns of clean and bad inputs: what detectors are trained on.

Memory is bounded: of each clean input a site gives its highest columns, which decide false alarms,
and some at random.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..data import Samples
from ..debugging_set import DebuggingSet
from ..runtime import Array
from .job import Job
from .labelling import over_attended
from .statistics import FeatureReader, Whitening

HIGHEST = 3
RANDOM = 3
"""How many columns of a clean input a site gives."""
CALM = 0.7
"""Whitened features of a normal column of a bad input are below this."""
CLEAN_INPUTS = 20_000
"""How many clean inputs give columns; statistics are taken of all."""


@dataclass(frozen=True)
class Columns:
    """n columns: whitened features `[n, F]`, index of the site `[n]`, whether anomalous `[n]`."""

    features: NDArray[np.float32]
    site: NDArray[np.int64]
    anomalous: NDArray[np.bool_]

    @classmethod
    def of(cls, parts: list[Columns]) -> Columns:
        """All of them in one."""
        return cls(
            np.concatenate([part.features for part in parts]),
            np.concatenate([part.site for part in parts]),
            np.concatenate([part.anomalous for part in parts]),
        )


def clean_columns(
    job: Job, reader: FeatureReader, whitening: Whitening, samples: Samples
) -> Columns:
    """Columns of clean inputs."""
    generator = job.generator()
    if samples.count > CLEAN_INPUTS:
        samples = samples.take(np.sort(generator.permutation(samples.count)[:CLEAN_INPUTS]))
    parts = []
    for values in reader.over(samples):
        for index, site in enumerate(job.sites):
            found = values[site.name]
            whitened = whitening.whitened(site.name, found)
            # [B * W, F, K] as [B, W * K, F]
            by_sample = whitened.transpose(0, 2, 1).reshape(
                len(whitened) // found.windows, -1, whitened.shape[1]
            )
            chosen = _chosen(by_sample.max(axis=2), generator)
            parts.append(_columns(by_sample[chosen], index, False))
    return Columns.of(parts)


def _chosen(height: Array, generator: np.random.Generator) -> tuple[Array, Array]:
    """Indices of the highest and of random visible columns of each sample, of `[B, W * K]`."""
    count = height.shape[1]
    highest = np.argsort(height, axis=1)[:, -min(HIGHEST, count) :]
    random = generator.integers(0, count, (len(height), RANDOM))
    columns = np.concatenate([highest, random], axis=1)
    rows = np.repeat(np.arange(len(height)), columns.shape[1])
    seen = np.isfinite(height[rows, columns.ravel()])
    return rows[seen], columns.ravel()[seen]


def bad_columns(
    job: Job, reader: FeatureReader, whitening: Whitening, bad: DebuggingSet
) -> Columns:
    """Anomalous columns of bad inputs, and those that stayed normal although they are unmarked."""
    parts, start = [], 0
    for values in reader.over(bad.bad):
        size = next(iter(values.values())).size
        marked = bad.marked(start, size)
        start += size
        for index, site in enumerate(job.sites):
            found = values[site.name]
            anomalous = over_attended(whitening, site, found, marked)
            whitened = whitening.whitened(site.name, found)
            calm = calm_columns(whitened, anomalous, marked)
            # As many as a clean input gives, so that bad inputs do not outweigh clean ones.
            calm &= np.cumsum(calm, axis=1) <= HIGHEST
            by_column = whitened.transpose(0, 2, 1)
            parts.append(_columns(by_column[anomalous], index, True))
            parts.append(_columns(by_column[calm], index, False))
    return Columns.of(parts)


def calm_columns(
    whitened: Array, anomalous: NDArray[np.bool_], marked: NDArray[np.bool_] | None
) -> NDArray[np.bool_]:
    """Columns of bad inputs that are surely normal: not marked, and not much above normal."""
    height = whitened.max(axis=1)
    calm = ~anomalous & np.isfinite(height) & (height < CALM)
    if marked is not None and marked.shape == calm.shape:
        calm &= ~marked
    return np.asarray(calm)


def _columns(features: Array, site: int, anomalous: bool) -> Columns:
    count = len(features)
    return Columns(
        features.astype(np.float32), np.full(count, site), np.full(count, anomalous, bool)
    )

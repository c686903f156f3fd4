"""Benign attention: what flagged columns get instead."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..data import Samples
from ..errors import InputError
from ..passes.probe import Probe
from ..passes.tables import Tables
from ..probed import Probed
from .job import Job
from .statistics import FloatArray, Whitening, check_opset

KINDS = ("column", "map", "uniform")
"""The clean mean of each column, one value a head; or of each entry of the map, one a query row, as
in the paper; or nothing stored: the uniform share."""

LARGEST_MAP = 64 << 20
"""Bytes that the mean maps of all sites may take in a detector."""


def tables_with_benign(
    job: Job, whitening: Whitening, clean: Samples, gain: dict[str, FloatArray] | None = None
) -> Tables:
    """The tables of a detector, with benign attention of the job's kind. Raises: InputError."""
    tables = whitening.tables(gain)
    check_opset(job.opset, tables)
    if job.benign == "column":
        return tables
    if job.benign == "uniform":
        return replace(tables, benign=None)
    if whitening.buckets:
        raise InputError(
            "--benign map needs maps of one size, and this model's vary: choose column or uniform"
        )
    means = _mean_maps(job, clean)
    shape = np.max([mean.shape for mean in means], axis=0)
    stored = np.zeros((len(means), *shape), np.float32)
    if stored.nbytes > LARGEST_MAP:
        raise InputError(
            f"--benign map would store {stored.nbytes >> 20} MiB of mean maps: choose column, or "
            "fewer sites with --sites"
        )
    for index, mean in enumerate(means):
        stored[index][tuple(map(slice, mean.shape))] = mean
    return replace(tables, benign=stored)


def _mean_maps(job: Job, clean: Samples) -> list[FloatArray]:
    """The mean map `[H, Q, K]` of each site; maps are averaged inside the runtime."""
    edits, _, maps = Probe(maps="batch_mean")(job.view, job.sites)
    session = Probed(job.model, edits, job.provider).session
    sums: dict[str, FloatArray] = {}
    total = 0
    for part in clean.batches(job.batch):
        if part.real == part.size:  # not one that is filled up with copies
            total += part.real
            for site, value in session.run(part.feeds, list(maps.values())).items():
                sums[site] = sums.get(site, 0.0) + value[0].astype(np.float64) * part.real
        job.tick(part.real)
    return [sums[maps[site.name]] / max(total, 1) for site in job.sites]

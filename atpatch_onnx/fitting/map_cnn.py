"""The paper's own shape of detector: a CNN and an MLP over the head mean of each map.

It is kept for comparison; see `contrastive` for what is shipped. Maps are kept while it trains, of
as many inputs as fit into a fixed amount of memory.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from ..data import Samples
from ..debugging_set import DebuggingSet
from ..errors import InputError
from ..passes.column_net import Levels, build_map_cnn
from ..passes.features import BASIC, HIDDEN
from ..runtime import Array
from .benign import tables_with_benign
from .columns import calm_columns
from .contrastive import VALIDATION
from .job import Job, Trained
from .labelling import over_attended
from .levels import level
from .statistics import FeatureReader, Whitening, whiten

MAP_BYTES = 64 << 20
"""How many bytes of maps training may hold."""

Labelled = list[tuple[Array, Array]]


def fit_map_cnn(job: Job, clean: Samples, bad: DebuggingSet) -> Trained:
    """Train on the maps of clean inputs and of labelled bad ones. Raises: InputError."""
    from ..models.column_training import Recipe, train_map_cnn

    reader = FeatureReader(job, BASIC)
    whitening = whiten(reader, clean)
    tables = tables_with_benign(job, whitening, clean)
    train, valid = _maps(job, whitening, clean, bad)
    if not any((labels == 1).any() for _, labels in train):
        raise InputError(
            "no column of the debugging set is over-attended at any site: check 'anomalous', or "
            "leave it out"
        )
    if not any((labels == 1).any() for _, labels in valid):
        valid = train
    recipe = Recipe()
    net, history = train_map_cnn(train, valid, job.seed, recipe)
    record: dict[str, object] = {"recipe": asdict(recipe), "history": asdict(history)}

    def build(levels: Levels, sites: NDArray[np.int64]) -> ModelProto:
        return build_map_cnn(tables.take(sites), net, levels, job.opset, job.ir_version)

    model, kept = level(job, whitening, build, clean, bad)
    return Trained(model, tuple(job.sites[i] for i in kept), whitening, record)


def _maps(
    job: Job, whitening: Whitening, clean: Samples, bad: DebuggingSet
) -> tuple[Labelled, Labelled]:
    """Labelled maps to train and to validate on, by shape."""
    reader = FeatureReader(job, BASIC, maps="head_mean")
    rows: dict[tuple[int, ...], list[tuple[Array, Array, Array]]] = defaultdict(list)
    for samples, debug in ((clean, None), (bad.bad, bad)):
        start = held = 0
        for values in reader.over(samples):
            size = next(iter(values.values())).size
            marked = None if debug is None else debug.marked(start, size)
            for site in job.sites:
                found = values[site.name]
                assert found.map is not None
                labels = np.where(found.bucket == HIDDEN, np.nan, 0).astype(np.float32)
                if debug is not None:
                    anomalous = over_attended(whitening, site, found, marked)
                    calm = calm_columns(whitening.whitened(site.name, found), anomalous, marked)
                    labels = np.where(anomalous, 1, np.where(calm, 0, np.nan)).astype(np.float32)
                count = (found.bucket != HIDDEN).sum(axis=1)[:, None, None]
                relative = found.map * count.astype(np.float32)
                sample = np.repeat(np.arange(start, start + size), found.windows)
                sample = sample if debug is None else -1 - sample
                rows[relative.shape[1:]].append((relative, labels, sample))
                held += relative.nbytes
            start += size
            if held > MAP_BYTES // 2:
                break
    return _parted(job, rows)


def _parted(
    job: Job, rows: dict[tuple[int, ...], list[tuple[Array, Array, Array]]]
) -> tuple[Labelled, Labelled]:
    """All maps of a sample go the same way."""
    samples = np.unique(np.concatenate([part[2] for parts in rows.values() for part in parts]))
    last = max(1, round(VALIDATION * len(samples)))
    chosen = job.generator().permutation(samples)[:last]
    train: Labelled = []
    valid: Labelled = []
    for parts in rows.values():
        maps, labels, sample = (np.concatenate([part[i] for part in parts]) for i in range(3))
        held = np.isin(sample, chosen)
        for target, index in ((train, ~held), (valid, held)):
            target.append((maps[index], labels[index]))
    return train, valid

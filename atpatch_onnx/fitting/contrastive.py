"""The contrastive detector: a small net over whitened column features, for every site."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from ..data import Samples
from ..debugging_set import DebuggingSet
from ..errors import InputError
from ..passes.column_net import Levels, build_contrastive
from ..passes.features import RICH
from ..runtime import Array
from .benign import tables_with_benign
from .columns import Columns, bad_columns, clean_columns
from .job import Job, Trained
from .levels import level
from .pooling import whiten_apart
from .statistics import FeatureReader

VALIDATION = 0.2
"""Share of the clean and of the bad inputs that decide when training stops."""


def fit_contrastive(job: Job, clean: Samples, bad: DebuggingSet) -> Trained:
    """Train on clean inputs and on labelled bad ones. Raises: InputError."""
    from ..models.column_training import Recipe, train_column_net

    reader = FeatureReader(job, RICH)
    whitening = whiten_apart(job, reader, clean, bad)
    tables = tables_with_benign(job, whitening, clean)
    parts: list[Columns] = []
    for some, others in zip(_split(job, clean.count), _split(job, bad.count), strict=True):
        normal = clean_columns(job, reader, whitening, clean.take(some))
        parts.append(Columns.of([normal, bad_columns(job, reader, whitening, bad.take(others))]))
    check_anomalous(parts[0])
    if not parts[1].anomalous.any():  # few bad inputs: better to stop late than by chance
        parts[1] = parts[0]
    train, valid = ((c.features, c.site, c.anomalous) for c in parts)
    recipe = Recipe()
    net, history = train_column_net(train, valid, len(job.sites), job.seed, recipe)
    by_site = np.bincount(parts[0].site[parts[0].anomalous], minlength=len(job.sites))
    record = {
        "features": list(RICH),
        "positions": whitening.positions,
        "recipe": asdict(recipe),
        "history": asdict(history),
        "columns": len(parts[0].anomalous),
        "anomalous_columns": dict(zip((s.name for s in job.sites), by_site.tolist(), strict=True)),
    }

    def build(levels: Levels, sites: NDArray[np.int64]) -> ModelProto:
        return build_contrastive(
            tables.take(sites), net.take(sites), levels, job.opset, job.ir_version
        )

    model, kept = level(job, whitening, build, clean, bad)
    return Trained(model, tuple(job.sites[i] for i in kept), whitening, record)


def _split(job: Job, count: int) -> tuple[Array, Array]:
    """Indices to train and to validate on."""
    order = job.generator().permutation(count)
    last = max(1, round(VALIDATION * count))
    return np.sort(order[last:]), np.sort(order[:last])


def check_anomalous(columns: Columns) -> None:
    """Raises: InputError where the bad inputs over-attend nothing."""
    if not columns.anomalous.any():
        raise InputError(
            "no column of the debugging set is attended to at least twice as much as in clean "
            "inputs, at any site: what makes these inputs bad does not work through attention, or "
            "the set is marked at the wrong columns; check 'anomalous', or leave it out"
        )

"""Scales: a spread is a position's own or shared, whichever sets the bad columns apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from atpatch_onnx.data import samples_from
from atpatch_onnx.debugging_set import DebuggingSet
from atpatch_onnx.fitting.job import Job
from atpatch_onnx.fitting.pooling import POOLED, pooled, whiten_apart
from atpatch_onnx.fitting.statistics import FeatureReader, Whitening, in_tails, standardised
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.passes.features import BASIC
from atpatch_onnx.passes.graph_view import GraphView
from atpatch_onnx.passes.locate import locate
from atpatch_onnx.runtime import Arrays, Session

from hosts import KEYS, over_attending, tokens

CALM, BUSY = 0, 3
"""A position where clean inputs hardly vary, and one like the others."""


@pytest.fixture
def job(tmp_path: Path) -> Job:
    onnx.save(over_attending(fixed=True), tmp_path / "host.onnx")
    file = ModelFile.open(tmp_path / "host.onnx")
    sites = locate(file.skeleton).sites
    return Job(file, GraphView.of(file.skeleton), sites, "cpu", 50, 0, "column", lambda _: None)


def calm(count: int, seed: int, exceptions: float) -> Arrays:
    """Clean inputs, of which a few have at the calm position a token like anywhere else."""
    rng = np.random.default_rng(seed)
    arrays = dict(tokens(count, seed))
    x = arrays["x"].copy()
    x[rng.random(count) >= exceptions, CALM] = -1
    return {**arrays, "x": x}


def triggered(job: Job, place: int, loud: float) -> DebuggingSet:
    arrays = calm(50, 1, exceptions=0)
    arrays["x"][:, place, 0] = loud
    marks = np.zeros((50, KEYS), bool)
    marks[:, place] = True
    samples = samples_from(arrays, Session(job.model.path, "cpu").inputs)
    return DebuggingSet(samples, anomalous=marks)


def apart(reader: FeatureReader, whitening: Whitening, bad: DebuggingSet) -> NDArray[np.float64]:
    """By feature, the share of bad columns beyond what one clean input in a hundred has."""
    site = reader.job.sites[0].name
    found = next(iter(reader.over(bad.bad)))[site]
    assert bad.anomalous is not None
    columns = whitening.whitened(site, found).transpose(0, 2, 1)[bad.anomalous]
    return np.asarray((columns > 1).mean(axis=0), np.float64)


@pytest.mark.parametrize(("place", "loud", "exceptions"), [(BUSY, 3.5, 0.02), (CALM, 2.0, 0.0)])
def test_each_feature_is_measured_on_the_scale_that_sets_most_bad_columns_apart(
    place: int, loud: float, exceptions: float, job: Job
) -> None:
    """A rare token at a calm place must not hide a loud one elsewhere, nor be hidden itself."""
    specs = Session(job.model.path, "cpu").inputs
    clean = samples_from(calm(1000, 0, exceptions), specs)
    bad = triggered(job, place, loud)
    reader = FeatureReader(job, BASIC)
    own = standardised(reader, clean)
    scales = in_tails(reader, clean, [pooled(own, share) for share in POOLED])
    shares = np.array([apart(reader, scale, bad) for scale in scales])
    chosen = whiten_apart(job, reader, clean, bad)
    np.testing.assert_array_equal(apart(reader, chosen, bad), shares.max(axis=0))
    mean = BASIC.index("mean")
    first, last = shares[0, mean], shares[-1, mean]
    assert (last > first + 0.1) if place == BUSY else (first > last + 0.1)


def test_a_pooled_variance_is_between_the_positions_own_and_their_mean(job: Job) -> None:
    clean = samples_from(calm(200, 0, 0.02), Session(job.model.path, "cpu").inputs)
    own = standardised(FeatureReader(job, BASIC), clean)
    name = job.sites[0].name
    variance = {share: np.square(pooled(own, share).spread[name]) for share in POOLED}
    np.testing.assert_allclose(variance[0.0], np.square(own.spread[name]))
    mean = variance[0.0].mean(axis=1, keepdims=True)
    np.testing.assert_allclose(variance[1.0], np.broadcast_to(mean, variance[1.0].shape))
    np.testing.assert_allclose(variance[0.5], (variance[0.0] + variance[1.0]) / 2)

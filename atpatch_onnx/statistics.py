"""Fit a detector inside ONNX Runtime: collect clean statistics, whiten, calibrate, write.

Maps never leave the runtime: a probed session returns column features, which are reduced to
running sums. The threshold comes from held-out clean inputs that the statistics have not seen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, helper

from .data import Samples
from .detector import ABI_VERSION, Detector
from .errors import InputError
from .model_file import ModelFile
from .passes.features import BUCKETS, FEATURES, HIDDEN
from .passes.graph_view import GraphView
from .passes.locate import Site
from .passes.probe import Probe
from .passes.score import Score
from .passes.zscore import Tables, build_zscore
from .patching import Patch, apply
from .runtime import Session

FloatArray = NDArray[np.float64]
Progress = Callable[[int], object]

MINIMUM_SAMPLES = 20
SPREAD_FLOOR = 0.1
"""Least standard deviation of a log share: a change of 10 % is never an outlier by itself."""
TAIL = 0.99
"""A site's scores are scaled by this quantile of its per-input maxima, so that no site, however
heavy its tail, spends the whole false-positive budget."""


@dataclass(frozen=True)
class Calibration:
    """A threshold and what it is worth.

    score: largest score that a clean input may have at any site.
    threshold: the same on the detector's 0..1 scale.
    budget: the per-input false-positive rate asked for.
    expected_fpr: false-positive rate to expect on unseen clean inputs, from exchangeability.
    calibration_inputs, fit_inputs: how many inputs each step has seen.
    honoured: whether there were enough inputs to promise the budget.
    """

    score: float
    threshold: float
    budget: float
    expected_fpr: float
    calibration_inputs: int
    fit_inputs: int
    honoured: bool


@dataclass
class _Moments:
    """Running sums of a site's features over positions or buckets P: `[F, P]` and `[H, P]`."""

    features: FloatArray
    squares: FloatArray
    columns: FloatArray
    count: FloatArray

    @classmethod
    def zeros(cls, heads: int, positions: int) -> _Moments:
        f = len(FEATURES)
        return cls(
            np.zeros((f, positions)),
            np.zeros((f, positions)),
            np.zeros((heads, positions)),
            np.zeros(positions),
        )


@dataclass
class SiteStatistics:
    """What is known of one site: over absolute positions while K does not change, and buckets."""

    heads: int
    keys: int
    positions: _Moments
    buckets: _Moments
    fixed: bool = True
    maxima: list[FloatArray] = field(default_factory=list)

    @classmethod
    def empty(cls, heads: int, keys: int) -> SiteStatistics:
        """No samples yet."""
        return cls(heads, keys, _Moments.zeros(heads, keys), _Moments.zeros(heads, BUCKETS))

    def add(self, columns: FloatArray, features: FloatArray, bucket: NDArray[np.int64]) -> None:
        """Add a batch. Shapes: columns `[B, H, K]`, features `[B, F, K]`, bucket `[B, K]`."""
        visible = bucket != HIDDEN
        count = visible.sum(axis=1)[:, None, None]
        for index in range(BUCKETS - 1):
            chosen = bucket == index
            self._sum(self.buckets, index, features, columns * count, chosen)
        if columns.shape[2] != self.keys or not visible.all():
            self.fixed = False
        if self.fixed:
            moments = self.positions
            moments.features += features.sum(axis=0)
            moments.squares += np.square(features).sum(axis=0)
            moments.columns += columns.sum(axis=0)
            moments.count += len(features)

    @staticmethod
    def _sum(
        moments: _Moments,
        index: int,
        features: FloatArray,
        columns: FloatArray,
        chosen: NDArray[np.bool_],
    ) -> None:
        weight = chosen[:, None, :]
        moments.features[:, index] += (features * weight).sum(axis=(0, 2))
        moments.squares[:, index] += (np.square(features) * weight).sum(axis=(0, 2))
        moments.columns[:, index] += (columns * weight).sum(axis=(0, 2))
        moments.count[index] += chosen.sum()

    def whitening(self, buckets: bool) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Mean and standard deviation `[F, P]` of the features, and mean columns `[H, P]`."""
        moments = self.buckets if buckets else self.positions
        count = np.maximum(moments.count, 1)
        mean = moments.features / count
        variance = np.maximum(moments.squares / count - np.square(mean), 0)
        spread = np.maximum(np.sqrt(variance), SPREAD_FLOOR)
        never = moments.count == 0
        # A position that was never seen cannot be judged: its columns score nothing.
        mean[:, never], spread[:, never] = 1e3, 1.0
        return mean, spread, moments.columns / count


def fit_zscore(
    model: ModelFile,
    sites: tuple[Site, ...],
    samples: Samples,
    provider: str,
    fpr: float = 0.01,
    seed: int = 0,
    batch: int = 32,
    progress: Progress | None = None,
) -> tuple[ModelProto, Calibration]:
    """A z-score detector for `sites` of `model`, calibrated on held-out inputs.

    Raises: InputError for too few samples or a budget that is no rate.
    """
    if not 0 < fpr < 1:
        raise InputError(f"--fpr {fpr}: the false-positive budget is a rate between 0 and 1")
    if samples.count < MINIMUM_SAMPLES:
        raise InputError(
            f"the data has {samples.count} samples, fitting needs at least {MINIMUM_SAMPLES} "
            "clean inputs and some hundreds to hold a budget of 1 %"
        )
    order = np.random.default_rng(seed).permutation(samples.count)
    held_out = _held_out(samples.count, fpr)
    fit, calibration = samples.take(order[held_out:]), samples.take(order[:held_out])
    view = GraphView.of(model.skeleton)
    sha256 = model.sha256()
    tables = _statistics(model, view, sites, fit, provider, batch, sha256, progress)
    _check_opset(view.opset, tables)
    detector = build_zscore(tables, view.opset, max(model.skeleton.ir_version, 4))
    scores = score_inputs(
        model,
        view,
        sites,
        _as_detector(detector, sites),
        calibration,
        provider,
        batch,
        sha256,
        progress,
    )
    found = calibrate(scores, fpr, fit.count)
    record = {
        "data_sha256": samples.sha256(),
        "samples": samples.count,
        "seed": seed,
        "features": list(FEATURES),
        "positions": "buckets" if tables.buckets else "absolute",
        "calibration": found.__dict__,
        "versions": {name: version(name) for name in ("atpatch-onnx", "numpy", "onnx")},
    }
    helper.set_model_props(
        detector,
        {
            "atpatch.abi": ABI_VERSION,
            "atpatch.kind": "zscore",
            "atpatch.scope": "site",
            "atpatch.threshold": repr(found.threshold),
            "atpatch.sites": json.dumps([site.name for site in sites]),
            "atpatch.host.sha256": sha256,
            "atpatch.training": json.dumps(record),
        },
    )
    return detector, found


def _held_out(count: int, fpr: float) -> int:
    """How many inputs to calibrate on: what the budget needs, within 30 % to 50 % of all."""
    needed = math.ceil(1 / fpr)
    return min(max(needed, round(0.3 * count)), count // 2)


def _check_opset(opset: int, tables: Tables) -> None:
    if opset < 10 and len(set(tables.heads)) + len(set(tables.keys)) > 2:
        raise InputError(
            f"the model is at opset {opset} and its sites differ in size, which one detector "
            "cannot express below opset 10: fit a detector for each size with --sites"
        )


def _statistics(
    model: ModelFile,
    view: GraphView,
    sites: tuple[Site, ...],
    samples: Samples,
    provider: str,
    batch: int,
    sha256: str,
    progress: Progress | None,
) -> Tables:
    edits, features, _ = Probe()(view, sites)
    session = Session(
        apply(model, Patch(sha256, tuple(edits)), sha256).content(), provider, model.folder
    )
    outputs = {name: (f.columns, f.features, f.bucket) for name, f in features.items()}
    wanted = [value for values in outputs.values() for value in values]
    fixed_inputs = all(isinstance(d, int) for i in session.inputs for d in i.shape[1:])
    known: dict[str, SiteStatistics] = {}
    for feeds, real in samples.batches(batch):
        values = session.run(feeds, wanted)
        for name, keys in outputs.items():
            columns, found, bucket = (_real(values[k], feeds, real) for k in keys)
            if name not in known:
                known[name] = SiteStatistics.empty(*columns.shape[1:])
            known[name].add(columns.astype(np.float64), found.astype(np.float64), bucket)
        _tick(progress, real)
    buckets = not fixed_inputs or not all(s.fixed for s in known.values())
    whitening = {name: s.whitening(buckets) for name, s in known.items()}
    tails: dict[str, list[FloatArray]] = {name: [] for name in known}
    for feeds, real in samples.batches(batch):
        values = session.run(feeds, wanted)
        for name, keys in outputs.items():
            _, found, bucket = (_real(values[k], feeds, real) for k in keys)
            tails[name].append(_maxima(found, bucket, whitening[name], buckets))
        _tick(progress, real)
    tables = _tables(
        [known[s.name] for s in sites],
        [whitening[s.name] for s in sites],
        [np.concatenate(tails[s.name]) for s in sites],
        buckets,
    )
    for index, site in enumerate(sites):
        # The first query of a causal site sees one key; the last of any other decides nothing.
        idle = "first_row" if site.facts.causal else "last_row"
        tables.gain[index, FEATURES.index(idle)] = 0
    return tables


def _maxima(
    features: NDArray[Any],
    bucket: NDArray[np.int64],
    whitening: tuple[FloatArray, FloatArray, FloatArray],
    buckets: bool,
) -> FloatArray:
    """The largest whitened value of each feature over the columns of each map, `[B, F]`."""
    mean, spread, _ = whitening
    if buckets:
        mean, spread = (t[:, bucket].transpose(1, 0, 2) for t in (mean, spread))
    largest: FloatArray = ((features - mean) / spread).max(axis=2)
    return largest


def _tables(
    known: list[SiteStatistics],
    whitening: list[tuple[FloatArray, FloatArray, FloatArray]],
    maxima: list[FloatArray],
    buckets: bool,
) -> Tables:
    heads, keys = tuple(s.heads for s in known), tuple(s.keys for s in known)
    positions = BUCKETS if buckets else max(keys)
    shape = (len(known), len(FEATURES), positions)
    center, gain = np.full(shape, 1e3), np.ones(shape)
    benign = np.zeros((len(known), max(heads), positions))
    for i, ((mean, spread, columns), tail) in enumerate(zip(whitening, maxima, strict=True)):
        scale = np.maximum(np.quantile(tail, TAIL, axis=0), 1.0)
        center[i, :, : mean.shape[1]] = mean
        gain[i, :, : mean.shape[1]] = 1 / (spread * scale[:, None])
        benign[i, : columns.shape[0], : columns.shape[1]] = columns
    same_keys = (0,) if buckets else keys
    return Tables(
        center.astype(np.float32),
        gain.astype(np.float32),
        benign.astype(np.float32),
        heads,
        same_keys,
        buckets,
    )


def _as_detector(model: ModelProto, sites: tuple[Site, ...]) -> Detector:
    names = tuple(site.name for site in sites)
    return Detector(Path("det.onnx"), model, "", "zscore", 0.5, names, None, {})


def score_inputs(
    model: ModelFile,
    view: GraphView,
    sites: tuple[Site, ...],
    detector: Detector,
    samples: Samples,
    provider: str,
    batch: int,
    sha256: str,
    progress: Progress | None = None,
) -> FloatArray:
    """The largest anomaly of each input over all sites, `[N]`, computed by the detector itself."""
    edits, outputs = Score(detector)(view, sites)
    session = Session(
        apply(model, Patch(sha256, tuple(edits)), sha256).content(), provider, model.folder
    )
    scores = []
    for feeds, real in samples.batches(batch):
        values = session.run(feeds, list(outputs.values()))
        per_site = [_per_sample(values[v], feeds)[:real] for v in outputs.values()]
        scores.append(np.max(per_site, axis=0))
        _tick(progress, real)
    return np.concatenate(scores).astype(np.float64)


def calibrate(anomalies: FloatArray, budget: float, fit_inputs: int) -> Calibration:
    """The least threshold that keeps the budget on exchangeable clean inputs.

    The k-th smallest of n held-out maxima, k = ceil((n + 1)(1 - budget)), is exceeded by a new
    clean input with probability at most 1 - k / (n + 1) (split conformal prediction, Vovk et al.
    2005). With fewer than 1 / budget - 1 inputs no threshold can promise the budget: the largest is
    taken.
    """
    ordered = np.sort(anomalies)
    n = len(ordered)
    k = min(math.ceil((n + 1) * (1 - budget)), n)
    anomaly = float(ordered[k - 1])
    # Flagged means strictly above, so that the calibrating input itself is not.
    threshold = float(np.nextafter(np.float32(anomaly), np.float32(2)))
    expected = 1 - k / (n + 1)
    return Calibration(
        score=anomaly / max(1 - anomaly, 1e-9),
        threshold=threshold,
        budget=budget,
        expected_fpr=expected,
        calibration_inputs=n,
        fit_inputs=fit_inputs,
        honoured=expected <= budget + 1e-12,
    )


def _real(value: NDArray[Any], feeds: dict[str, NDArray[Any]], real: int) -> NDArray[Any]:
    """The entries of a batch that are no padding; windows count with the sample they are from."""
    batch = max((len(v) for v in feeds.values() if v.ndim), default=1)
    per_sample = max(len(value) // batch, 1)
    return value[: real * per_sample]


def _per_sample(value: NDArray[Any], feeds: dict[str, NDArray[Any]]) -> FloatArray:
    """The largest anomaly of each sample, over windows, heads and columns, `[B]`."""
    batch = max((len(v) for v in feeds.values() if v.ndim), default=1)
    if len(value) % batch:
        return np.repeat(value.max(), batch).astype(np.float64)
    per_sample: FloatArray = value.reshape(batch, -1).max(axis=1).astype(np.float64)
    return per_sample


def _tick(progress: Progress | None, count: int) -> None:
    if progress is not None:
        progress(count)

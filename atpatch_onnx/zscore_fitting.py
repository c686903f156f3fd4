"""Fit the z-score detector inside ONNX Runtime: collect clean statistics, whiten, calibrate.

Maps never leave the runtime: a probed session returns column features, which are reduced to
running sums. The threshold comes from held-out clean inputs that the statistics have not seen.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, helper

from .calibration import Calibration, calibrate, held_out
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
from .probed import Probed
from .progress import Tick
from .runtime import Array

FloatArray = NDArray[np.float64]

MINIMUM_SAMPLES = 20
SPREAD_FLOOR = 0.1
"""Least standard deviation of a log share: a change of 10 % is never an outlier by itself."""
TAIL = 0.99
"""A site's scores are scaled by this quantile of its per-input maxima, so that no site, however
heavy its tail, spends the whole false-positive budget."""


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


@dataclass(frozen=True)
class ZScoreFit:
    """A fit of z-score detectors for `sites` of `model`.

    provider: execution provider; batch: inputs a run; tick: told of every input, three times for
    those that statistics are taken of and once for the others.
    """

    model: ModelFile
    sites: tuple[Site, ...]
    provider: str
    batch: int
    tick: Tick

    def __call__(self, samples: Samples, fpr: float, seed: int) -> tuple[ModelProto, Calibration]:
        """The detector, and what its threshold is worth.

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
        held = held_out(samples.count, fpr)
        fit, unseen = samples.take(order[held:]), samples.take(order[:held])
        view = GraphView.of(self.model.skeleton)
        tables = self.statistics(view, fit)
        _check_opset(view.opset, tables)
        detector = build_zscore(tables, view.opset, max(self.model.skeleton.ir_version, 4))
        scores = self.scores(view, detector, unseen)
        calibration = calibrate(scores, fpr, fit.count)
        record = {
            "data_sha256": samples.sha256(),
            "samples": samples.count,
            "seed": seed,
            "features": list(FEATURES),
            "positions": "buckets" if tables.buckets else "absolute",
            "calibration": asdict(calibration),
            "versions": {name: version(name) for name in ("atpatch-onnx", "numpy", "onnx")},
        }
        helper.set_model_props(
            detector,
            {
                "atpatch.abi": ABI_VERSION,
                "atpatch.kind": "zscore",
                "atpatch.scope": "site",
                "atpatch.threshold": repr(calibration.threshold),
                "atpatch.sites": json.dumps([site.name for site in self.sites]),
                "atpatch.host.sha256": self.model.sha256,
                "atpatch.training": json.dumps(record),
            },
        )
        return detector, calibration

    def statistics(self, view: GraphView, samples: Samples) -> Tables:
        """Whitening, scales and benign attention from two runs over `samples`."""
        edits, features, _ = Probe()(view, self.sites)
        probed = Probed(self.model, edits, self.provider)
        outputs = {name: (f.columns, f.features, f.bucket) for name, f in features.items()}
        wanted = [value for values in outputs.values() for value in values]
        fixed = all(isinstance(d, int) for i in probed.session.inputs for d in i.shape[1:])
        known: dict[str, SiteStatistics] = {}
        for values in probed.over(samples, wanted, self.batch, self.tick):
            for name, keys in outputs.items():
                columns, found, bucket = (_maps(values[k]) for k in keys)
                if name not in known:
                    known[name] = SiteStatistics.empty(*columns.shape[1:])
                known[name].add(columns.astype(np.float64), found.astype(np.float64), bucket)
        buckets = not fixed or not all(site.fixed for site in known.values())
        whitening = {name: site.whitening(buckets) for name, site in known.items()}
        tails: dict[str, list[FloatArray]] = {name: [] for name in known}
        for values in probed.over(samples, wanted, self.batch, self.tick):
            for name, keys in outputs.items():
                windows = values[keys[1]].shape[1]
                _, found, bucket = (_maps(values[k]) for k in keys)
                largest = _maxima(found, bucket, whitening[name], buckets)
                tails[name].append(largest.reshape(-1, windows, largest.shape[1]).max(axis=1))
        names = [site.name for site in self.sites]
        tables = _tables(
            [known[name] for name in names],
            [whitening[name] for name in names],
            [np.concatenate(tails[name]) for name in names],
            buckets,
        )
        for index, site in enumerate(self.sites):
            # The first query of a causal site sees one key; the last of another decides nothing.
            idle = "first_row" if site.facts.causal else "last_row"
            tables.gain[index, FEATURES.index(idle)] = 0
        return tables

    def scores(self, view: GraphView, model: ModelProto, samples: Samples) -> FloatArray:
        """The largest anomaly of each sample over all sites, `[N]`, as the detector says it."""
        names = tuple(site.name for site in self.sites)
        detector = Detector(Path("det.onnx"), model, "", "zscore", 0.5, names, None, {})
        edits, outputs = Score(detector)(view, self.sites)
        probed = Probed(self.model, edits, self.provider)
        found = [
            np.max([v.reshape(len(v), -1).max(axis=1) for v in values.values()], axis=0)
            for values in probed.over(samples, list(outputs.values()), self.batch, self.tick)
        ]
        return np.concatenate(found).astype(np.float64)


def _maps(value: Array) -> Array:
    """`[B, windows, ..]` as one map after the other."""
    return value.reshape(-1, *value.shape[2:])


def _check_opset(opset: int, tables: Tables) -> None:
    if opset < 10 and len(set(tables.heads)) + len(set(tables.keys)) > 2:
        raise InputError(
            f"the model is at opset {opset} and its sites differ in size, which one detector "
            "cannot express below opset 10: fit a detector for each size with --sites"
        )


def _maxima(
    features: Array,
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

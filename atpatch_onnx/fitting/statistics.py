"""What is normal at each site and position, collected inside ONNX Runtime.

Maps never leave the runtime: a probed session returns column features, which are reduced to
running sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..data import Samples
from ..errors import InputError
from ..passes.features import BASIC, BUCKETS, HIDDEN
from ..passes.locate import locate
from ..passes.probe import Probe
from ..passes.tables import Tables
from ..probed import Probed
from ..runtime import Array
from .job import Job

FloatArray = NDArray[np.float64]

SPREAD_FLOOR = 0.1
"""Least standard deviation of a log share: a change of 10 % is never an outlier by itself."""
TAIL = 0.99
"""Distances are measured in this quantile of the largest distance in a clean input, so that no site
and no feature, however heavy its tail, spends the whole false-positive budget."""
WINDOWED = 4
"""Samples that show how many windows there are."""
UNSEEN = 1e3
"""The mean of a position that was never seen: it cannot be judged, its columns score nothing."""


@dataclass(frozen=True)
class Found:
    """Features of a batch at one site, windows of a sample one after the other.

    Shapes: columns `[B * W, H, K]`, features `[B * W, F, K]`, bucket `[B * W, K]`; windows is W.
    map: `[B * W, H, Q, K]`, or `[B * W, Q, K]` if it is the mean over heads; None if not asked for.
    """

    columns: FloatArray
    features: FloatArray
    bucket: NDArray[np.int64]
    windows: int
    map: Array | None = None

    @property
    def size(self) -> int:
        """Number of samples."""
        return len(self.bucket) // self.windows


class FeatureReader:
    """Reads column features of a model at its sites, batch by batch.

    maps: "whole" or "head_mean" to read maps too.
    """

    def __init__(self, job: Job, features: tuple[str, ...], maps: str = "") -> None:
        self.job, self.features, self.maps = job, features, maps
        edits, found, read = Probe(features, maps, job.rows)(job.view, job.sites)
        self.probed = Probed(job.model, edits, job.provider)
        self._outputs = {
            name: [f.columns, f.features, f.bucket, *([read[name]] if maps else [])]
            for name, f in found.items()
        }

    @property
    def fixed(self) -> bool:
        """Whether the model's inputs have no free dimension but the batch."""
        specs = self.probed.session.inputs
        return all(isinstance(d, int) for spec in specs for d in spec.shape[1:])

    def _check_run(self, values: Mapping[str, Array]) -> None:
        """Raises: InputError for a site in a branch that these inputs do not take."""
        for site, keys in self._outputs.items():
            if not values[keys[0]].size:
                raise InputError(
                    f"the site '{site}' is in a branch that some of the inputs do not take, so "
                    "that nothing can be learnt of it: choose others with --sites, or give inputs "
                    "that all take its branch"
                )

    def over(self, samples: Samples) -> Iterator[dict[str, Found]]:
        """What is found at each site, by its name, for each batch."""
        wanted = [value for values in self._outputs.values() for value in values]
        for values in self.probed.over(samples, wanted, self.job.batch, self.job.tick):
            self._check_run(values)
            yield {
                name: _found([values[key] for key in keys], self.maps == "head_mean")
                for name, keys in self._outputs.items()
            }


def _found(values: list[Array], head_mean: bool) -> Found:
    columns, features, bucket, *maps = (v.reshape(-1, *v.shape[2:]) for v in values)
    windows = values[0].shape[1]
    read = maps[0] if maps else None
    if read is not None and head_mean:
        read = read[:, 0]
    return Found(columns.astype(np.float64), features.astype(np.float64), bucket, windows, read)


@dataclass
class _Moments:
    """Running sums of a site's features over positions or buckets P: `[F, P]` and `[H, P]`."""

    features: FloatArray
    squares: FloatArray
    columns: FloatArray
    count: FloatArray

    @classmethod
    def zeros(cls, features: int, heads: int, positions: int) -> _Moments:
        return cls(
            np.zeros((features, positions)),
            np.zeros((features, positions)),
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
    def empty(cls, features: int, heads: int, keys: int) -> SiteStatistics:
        """No samples yet."""
        positions = _Moments.zeros(features, heads, keys)
        return cls(heads, keys, positions, _Moments.zeros(features, heads, BUCKETS))

    def add(self, found: Found) -> None:
        """Add a batch."""
        columns, features, bucket = found.columns, found.features, found.bucket
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

    def normal(self, buckets: bool) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Mean and standard deviation `[F, P]` of the features, and mean columns `[H, P]`."""
        moments = self.buckets if buckets else self.positions
        count = np.maximum(moments.count, 1)
        mean = moments.features / count
        variance = np.maximum(moments.squares / count - np.square(mean), 0)
        spread = np.maximum(np.sqrt(variance), SPREAD_FLOOR)
        never = moments.count == 0
        mean[:, never], spread[:, never] = UNSEEN, 1.0
        return mean, spread, moments.columns / count


@dataclass(frozen=True)
class Whitening:
    """What is normal at each site, by its name: mean and spread `[F, P]`, columns `[H, P]`.

    spread: the distance from the mean that one clean input in a hundred reaches in any column.

    buckets: whether the positions P are buckets; heads, keys: of each site.
    """

    features: tuple[str, ...]
    mean: dict[str, FloatArray]
    spread: dict[str, FloatArray]
    columns: dict[str, FloatArray]
    heads: dict[str, int]
    keys: dict[str, int]
    buckets: bool

    @property
    def positions(self) -> str:
        """What positions are, for a training record."""
        return "buckets" if self.buckets else "absolute"

    def distance(self, site: str, found: Found) -> FloatArray:
        """How far features are from their clean mean, `[B * W, F, K]`."""
        return found.features - self._at(self.mean[site], found)

    def whitened(self, site: str, found: Found) -> FloatArray:
        """The same by the spread; columns that no query sees are at minus infinity."""
        value = self.distance(site, found) / self._at(self.spread[site], found)
        return np.where((found.bucket == HIDDEN)[:, None, :], -np.inf, value)

    def _at(self, table: FloatArray, found: Found) -> FloatArray:
        if not self.buckets:
            return table
        return table[:, found.bucket].transpose(1, 0, 2)

    def tables(self, gain: dict[str, FloatArray] | None = None) -> Tables:
        """Tables of a detector, padded to the largest site; `gain` is 1 / spread by default."""
        names = list(self.mean)
        heads, keys = tuple(self.heads.values()), tuple(self.keys.values())
        positions = BUCKETS if self.buckets else max(keys)
        shape = (len(names), len(self.features), positions)
        center, gains = np.full(shape, UNSEEN, np.float32), np.ones(shape, np.float32)
        benign = np.zeros((len(names), max(heads), positions), np.float32)
        for i, name in enumerate(names):
            mean, columns = self.mean[name], self.columns[name]
            center[i, :, : mean.shape[1]] = mean
            gains[i, :, : mean.shape[1]] = 1 / self.spread[name] if gain is None else gain[name]
            benign[i, : columns.shape[0], : columns.shape[1]] = columns
        same_keys = (0,) if self.buckets else keys
        return Tables(self.features, center, gains, benign, heads, same_keys, self.buckets)


def windows_of(job: Job, samples: Samples) -> dict[str, int]:
    """How many maps a sample has at each site of the main graph, whichever are fitted for."""
    sites = tuple(site for site in locate(job.model.skeleton).sites if not site.path)
    if not sites:
        return {}
    reader = FeatureReader(replace(job, sites=sites), BASIC)
    some = samples.take(np.arange(min(WINDOWED, samples.count)))
    return {name: found.windows for name, found in next(reader.over(some)).items()}


def whiten(reader: FeatureReader, samples: Samples) -> Whitening:
    """Two runs over clean `samples`: what is normal at each site, and how heavy its tails are."""
    return in_tails(reader, samples, [standardised(reader, samples)])[0]


def in_tails(
    reader: FeatureReader, samples: Samples, whitenings: Sequence[Whitening]
) -> list[Whitening]:
    """One run over clean `samples`: whitenings whose spreads are the tails of their distances."""
    maxima: list[dict[str, list[FloatArray]]] = [{} for _ in whitenings]
    for values in reader.over(samples):
        for whitening, parts in zip(whitenings, maxima, strict=True):
            for name, found in values.items():
                largest = whitening.whitened(name, found).max(axis=2)
                by_sample = largest.reshape(-1, found.windows, largest.shape[1])
                parts.setdefault(name, []).append(by_sample.max(axis=1))
    scaled = []
    for whitening, parts in zip(whitenings, maxima, strict=True):
        tails = {n: np.quantile(np.concatenate(part), TAIL, axis=0) for n, part in parts.items()}
        spread = {
            name: spread * np.maximum(tails[name], 1.0)[:, None]
            for name, spread in whitening.spread.items()
        }
        scaled.append(replace(whitening, spread=spread))
    return scaled


def standardised(reader: FeatureReader, samples: Samples) -> Whitening:
    """What is normal, with standard deviations as spreads."""
    names = reader.features
    known: dict[str, SiteStatistics] = {}
    for values in reader.over(samples):
        for site, found in values.items():
            if site not in known:
                known[site] = SiteStatistics.empty(len(names), *found.columns.shape[1:])
            known[site].add(found)
    buckets = not reader.fixed or not all(site.fixed for site in known.values())
    normal = {name: site.normal(buckets) for name, site in known.items()}
    mean, spread, columns = ({k: v[i] for k, v in normal.items()} for i in range(3))
    return Whitening(
        names,
        mean,
        spread,
        columns,
        {name: site.heads for name, site in known.items()},
        {name: site.keys for name, site in known.items()},
        buckets,
    )


def check_opset(opset: int, tables: Tables) -> None:
    """Raises: InputError where tables need a Slice that the opset lacks."""
    if opset < 10 and len(set(tables.heads)) + len(set(tables.keys)) > 2:
        raise InputError(
            f"the model is at opset {opset} and its sites differ in size, which one detector "
            "cannot express below opset 10: fit a detector for each size with --sites"
        )

"""CleanSight's statistics over samples: collected, whitened, and how far inputs are from normal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..data import Samples
from ..detector import Detector
from ..errors import InputError
from ..passes.cleansight import Distance, Table
from ..passes.locate import Site
from ..passes.observe import Observe
from ..passes.visual_ratio import Statistic, build_statistics
from ..probed import Probed
from ..runtime import Array
from ..signature import DetectorScope
from .job import Job
from .statistics import SPREAD_FLOOR, FloatArray
from .visual_prompt import Asked, check_parts

Key = tuple[str, Statistic]
"""A site and what is measured there."""

RATIO_FLOOR = 1e-8
"""Beside the standard deviation of a ratio, as in the paper."""
SHRINKAGE = 0.1
"""How much of a covariance is taken from the identity."""


@dataclass(frozen=True)
class Found:
    """Statistics of N samples, by site and statistic: `[N, H]`, of V visual keys `[N, H, V]`."""

    values: dict[Key, FloatArray]
    count: int

    def take(self, index: NDArray[np.int64]) -> Found:
        """The samples at `index`."""
        return Found({key: value[index] for key, value in self.values.items()}, len(index))


class Collector:
    """Collects statistics of `sites` inside ONNX Runtime."""

    def __init__(
        self, job: Job, sites: Sequence[Site], asked: Asked, statistics: Sequence[Statistic]
    ) -> None:
        self.job, self.asked, self.visual = job, asked, 0
        names = [site.name for site in sites]
        self.keys = [(name, statistic) for name in names for statistic in statistics]
        model = build_statistics(names, asked.parts, statistics, job.opset, job.ir_version)
        fragment = Detector.unsaved(model, scope=DetectorScope.MODEL, bindings=asked.bindings)
        edits, self._outputs = Observe(fragment)(job.view, sites)
        self._probed = Probed(job.model, edits, job.provider)

    def __call__(self, samples: Samples) -> Found:
        """One run over the samples. Raises: InputError where image or prompt are not there."""
        parts: dict[str, list[Array]] = {name: [] for name in self._outputs}
        wanted = list(self._outputs.values())
        for found in self._probed.over(samples, wanted, self.job.batch, self.job.tick):
            for name, output in self._outputs.items():
                parts[name].append(found[output][:, 0])
        whole = {name: np.concatenate(part) for name, part in parts.items()}
        check_parts(self.asked, whole["visual_keys"], whole["prompt_keys"], whole["length"])
        visual = whole["visual_keys"] > 0
        self._check_same(visual.sum(axis=1))
        return Found({key: self._values(whole, key, visual) for key in self.keys}, samples.count)

    def _check_same(self, counts: NDArray[np.int64]) -> None:
        """Raises: InputError for images of several sizes, whose keys cannot be compared."""
        sizes = {int(count) for count in counts} | ({self.visual} if self.visual else set())
        if any(key[1] is Statistic.COLUMNS for key in self.keys) and len(sizes) > 1:
            raise InputError(
                f"the images have {min(sizes)} to {max(sizes)} visual tokens, and the statistic "
                "'columns' needs the same number in all: leave it out with --statistics"
            )
        self.visual = min(sizes)

    def _values(self, whole: dict[str, Array], key: Key, visual: NDArray[np.bool_]) -> FloatArray:
        site, statistic = key
        value = whole[f"{statistic}.{site}"].astype(np.float64)
        if statistic is not Statistic.COLUMNS:
            return value
        return (
            value.transpose(0, 2, 1)[visual]
            .reshape(len(value), -1, value.shape[1])
            .transpose(0, 2, 1)
        )


def normal(keys: Sequence[Key], clean: Found) -> list[Table]:
    """What is normal of clean values, to be whitened by standard deviations."""
    tables = []
    for site, statistic in keys:
        values = clean.values[site, statistic]
        spread = values.std(axis=0)
        ratio = statistic is Statistic.RATIO
        spread = spread + RATIO_FLOOR if ratio else np.maximum(spread, SPREAD_FLOOR)
        tables.append(_table((site, statistic), values.mean(axis=0), 1 / spread))
    return tables


def towards(keys: Sequence[Key], clean: Found, bad: Found) -> list[Table]:
    """The direction from clean to bad values in which they differ most: Fisher's discriminant.

    Their covariance is shrunk to the identity, so that there may be more values than inputs. On
    clean inputs the projection has mean 0 and standard deviation 1.
    """
    whitened = normal(keys, clean)
    one, other = (
        np.concatenate([_whitened(table, found) for table in whitened], axis=1)
        for found in (clean, bad)
    )
    difference = other.mean(axis=0)
    apart = [(part - part.mean(axis=0)) / math.sqrt(2 * len(part)) for part in (one, other)]
    _, scale, axes = np.linalg.svd(np.concatenate(apart), full_matrices=False)
    along = axes @ difference
    direction = (difference - along @ axes) / SHRINKAGE
    direction += (along / ((1 - SHRINKAGE) * scale**2 + SHRINKAGE)) @ axes
    direction /= max(float((one @ direction).std()), 1e-12)
    tables, begin = [], 0
    for table in whitened:
        end = begin + table.gain.size
        gain = table.gain * direction[begin:end].reshape(table.gain.shape)
        tables.append(replace(table, gain=gain.astype(np.float32)))
        begin = end
    return tables


def distances(tables: Sequence[Table], distance: Distance, found: Found) -> FloatArray:
    """How far samples are from normal, `[N]`."""
    whitened = np.concatenate([_whitened(table, found) for table in tables], axis=1)
    if distance is Distance.NORM:
        return np.asarray(np.linalg.norm(whitened, axis=1))
    return np.asarray(np.maximum(whitened.sum(axis=1), 0))


def _whitened(table: Table, found: Found) -> FloatArray:
    values = found.values[table.site, table.statistic]
    return np.asarray((values - table.center) * table.gain).reshape(found.count, -1)


def _table(key: Key, center: FloatArray, gain: FloatArray) -> Table:
    return Table(*key, center.astype(np.float32), gain.astype(np.float32))

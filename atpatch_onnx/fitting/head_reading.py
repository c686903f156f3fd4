"""What is normal of heads: their clean maps, and how alike they are in inputs of each length.

Read inside ONNX Runtime with the nodes that later stand in the detector.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..data import Samples
from ..detector import Detector
from ..errors import InputError, RefusedError
from ..passes.features import FIRST, LAST
from ..passes.head_maps import OLDEST_OPSET, NormalSite
from ..passes.head_similarity import HeadNorm, build_reading
from ..passes.observe import Observe
from ..probed import Probed
from ..runtime import Arrays
from ..signature import DetectorScope
from .benign import tables_with_benign
from .job import Job
from .statistics import FloatArray, Found, SiteStatistics, Whitening

SINK = 2.0
"""A column that clean inputs give this many times the uniform share is an attention sink."""
LEAST_HEADS = 2
SPREAD = 1e-3
"""Least standard deviation of a similarity: a head that never changes is no outlier by noise."""
SAME_LENGTH = 1e-6
"""Least spread of log lengths from which a slope can be told."""


@dataclass(frozen=True)
class Alike:
    """How alike heads are in N samples, by site.

    similarity: `[N, H]`; log_length: `[N]`, of the number of visible keys.
    """

    similarity: Mapping[str, FloatArray]
    log_length: Mapping[str, FloatArray]

    def whitened(self, norms: Mapping[str, HeadNorm]) -> dict[str, FloatArray]:
        """How far heads are above normal, `[N, H]`."""
        found = {}
        for name, norm in norms.items():
            normal = norm.center + norm.slope * self.log_length[name][:, None]
            found[name] = (self.similarity[name] - normal) * norm.gain
        return found

    def norms(self) -> dict[str, HeadNorm]:
        """What is normal where these samples are clean: a line over the log of the length."""
        return {name: self._norm(name) for name in self.similarity}

    def _norm(self, name: str) -> HeadNorm:
        value, length = self.similarity[name], self.log_length[name]
        ones = np.ones_like(length)
        table = np.stack([ones, length if length.std() > SAME_LENGTH else 0 * ones], axis=1)
        line = np.linalg.lstsq(table, value, rcond=None)[0]
        spread = np.maximum((value - table @ line).std(axis=0), SPREAD)
        center, slope, gain = (x.astype(np.float32) for x in (line[0], line[1], 1 / spread))
        return HeadNorm(center, slope, gain)


class HeadReader:
    """Reads heads of a model at `sites`, batch by batch."""

    def __init__(self, job: Job, sites: Sequence[NormalSite], similarity: str = "") -> None:
        if job.opset < OLDEST_OPSET:
            raise InputError(
                f"the model is at opset {job.opset}, and the similarity of heads needs "
                f"{OLDEST_OPSET}: convert it with onnx.version_converter.convert_version(model, 13)"
            )
        self.job, self.sites = job, sites
        model = build_reading(sites, similarity, job.opset, job.ir_version)
        reading = Detector.unsaved(model, scope=DetectorScope.MODEL)
        edits, self._outputs = Observe(reading)(job.view, job.sites)
        self._probed = Probed(job.model, edits, job.provider)

    @property
    def fixed(self) -> bool:
        """Whether the model's inputs have no free dimension but the batch."""
        specs = self._probed.session.inputs
        return all(isinstance(d, int) for spec in specs for d in spec.shape[1:])

    def over(self, samples: Samples) -> Iterator[Arrays]:
        """What is read, `[B, W, ..]`, by the names of `build_reading`."""
        wanted = list(self._outputs.values())
        for values in self._probed.over(samples, wanted, self.job.batch, self.job.tick):
            yield {name: values[output] for name, output in self._outputs.items()}

    def alike(self, samples: Samples) -> Alike:
        """How alike heads are in samples."""
        similarity: dict[str, list[FloatArray]] = {site.name: [] for site in self.sites}
        length: dict[str, list[FloatArray]] = {site.name: [] for site in self.sites}
        for values in self.over(samples):
            for name in similarity:
                similarity[name].append(values[f"similarity.{name}"][:, 0].astype(np.float64))
                count = values[f"count.{name}"][:, 0, 0].astype(np.float64)
                length[name].append(np.log(np.maximum(count, 1)))
        return Alike(
            {name: np.concatenate(parts) for name, parts in similarity.items()},
            {name: np.concatenate(parts) for name, parts in length.items()},
        )


def normal_sites(job: Job, clean: Samples) -> list[NormalSite]:
    """The sites of the job whose heads can be compared, with their sinks and benign maps.

    Left out are sites in branches, sites with several maps a sample, as windows of an image, and
    those with one head. Raises: RefusedError if none is left.
    """
    outside = [site for site in job.sites if not site.path]
    none = np.zeros(0, bool)
    bare = [NormalSite(site.name, 0, site.facts.cross, False, none) for site in outside]
    reader = HeadReader(job, bare) if bare else None
    known: dict[str, SiteStatistics] = {}
    unfit: set[str] = set()
    for values in reader.over(clean) if reader else ():
        for site in bare:
            columns = values[f"columns.{site.name}"]
            if columns.shape[1] != 1 or columns.shape[2] < LEAST_HEADS:
                unfit.add(site.name)
                continue
            columns, bucket = columns[:, 0].astype(np.float64), values[f"bucket.{site.name}"][:, 0]
            if site.name not in known:
                known[site.name] = SiteStatistics.empty(0, *columns.shape[1:])
            features = np.zeros((len(columns), 0, columns.shape[2]))
            known[site.name].add(Found(columns, features, bucket, 1))
    known = {name: site for name, site in known.items() if name not in unfit}
    if reader is None or not known:
        raise RefusedError(
            f"{job.model.path} has no site in its main graph with one map a sample and several "
            "heads, so that no heads can be compared: fit --kind zscore"
        )
    buckets = not reader.fixed or not all(site.fixed for site in known.values())
    usable = tuple(site for site in outside if site.name in known)
    by_name = {site.name: site for site in bare}
    sites = []
    columns_of = {site.name: known[site.name].normal(buckets)[2] for site in usable}
    benign = _benign(replace(job, sites=usable), clean, known, columns_of, buckets)
    for name, columns in columns_of.items():
        sinks = columns.mean(axis=0) * (1 if buckets else columns.shape[1]) >= SINK
        if buckets:  # delimiters, as [CLS] and [SEP]: no part of the text, and common to all
            sinks[[FIRST, LAST]] = True
        sites.append(
            replace(
                by_name[name],
                heads=len(columns),
                buckets=buckets,
                sinks=sinks,
                benign=benign.get(name),
            )
        )
    return sites


def _benign(
    job: Job,
    clean: Samples,
    known: Mapping[str, SiteStatistics],
    columns: Mapping[str, FloatArray],
    buckets: bool,
) -> dict[str, NDArray[np.float32]]:
    """The benign maps of each site, where the job wants any stored. Raises: InputError."""
    nothing = {name: np.zeros((0, value.shape[1])) for name, value in columns.items()}
    heads = {name: site.heads for name, site in known.items()}
    keys = {name: site.keys for name, site in known.items()}
    whitening = Whitening((), nothing, nothing, dict(columns), heads, keys, buckets)
    table = tables_with_benign(job, whitening, clean).benign
    if table is None:
        return {}
    found = {}
    for index, (name, value) in enumerate(columns.items()):
        own = table[index, : heads[name], ..., : value.shape[1]]
        if own.ndim == 3:  # every row of a mean map has mass, those of padding have none
            own = own[:, own.any(axis=(0, 2))]
        found[name] = own
    return found

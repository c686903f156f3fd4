"""What heads give, collected inside ONNX Runtime: pairs of a context and how it should change.

The first and the last token of a sample decide in classifiers and decoders; each counts as much as
all tokens between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..data import Samples
from ..debugging_set import DebuggingSet
from ..passes.align import read_contexts
from ..passes.graph_view import GraphView
from ..passes.head_maps import NormalSite
from ..passes.locate import Site
from ..probed import Probed
from .head_importance import replaceable, with_heads
from .heads import Head
from .job import Job
from .low_rank import Moments
from .statistics import FloatArray

Rows = NDArray[np.intp]
Contexts = dict[str, tuple[FloatArray, NDArray[np.bool_]]]
"""By site: contexts of a batch `[B, Q, H, D]`, and which rows are no padding, `[B, Q]`."""


class ContextReader:
    """Reads the contexts of `heads` in a model some of whose heads get their benign maps.

    sites: what is normal at the sites of the job; heads: those that are ever looked at.
    """

    def __init__(self, job: Job, sites: Sequence[NormalSite], heads: Sequence[Head]) -> None:
        self.job = job
        self.known = {site.name: site.heads for site in sites}
        names = {site for site, _ in heads}
        self.read: list[Site] = [site for site in job.sites if site.name in names]
        self.heads = {site.name: [h for s, h in heads if s == site.name] for site in self.read}
        file, edits = replaceable(job, sites)
        more, self._outputs = read_contexts(GraphView.of(file.skeleton), self.read)
        self._probed = Probed(file, [*edits, *more], job.provider)

    def over(self, samples: Samples, replaced: Sequence[Head] = ()) -> Iterator[Contexts]:
        """The contexts, batch by batch, with the heads `replaced`."""
        wanted = [name for pair in self._outputs.values() for name in pair]
        given = with_heads(samples, replaced, self.known)
        for values in self._probed.over(given, wanted, self.job.batch, self.job.tick):
            yield {
                site.name: self._rows(site, *(values[n] for n in self._outputs[site.name]))
                for site in self.read
            }

    def _rows(
        self, site: Site, context: NDArray[np.floating], keys: NDArray[np.floating]
    ) -> tuple[FloatArray, NDArray[np.bool_]]:
        by_token = context[:, 0][:, self.heads[site.name]].astype(np.float64).transpose(0, 2, 1, 3)
        queries = by_token.shape[1]
        if site.facts.cross:
            return by_token, np.ones(by_token.shape[:2], bool)
        return by_token, keys[:, 0, 0, 0, -queries:] > 0


def clean_moments(reader: ContextReader, samples: Samples) -> dict[str, Moments]:
    """Contexts of clean samples, which should stay as they are, by site."""
    found: dict[str, Moments] = {}
    for batch in reader.over(samples):
        for name, (context, real) in batch.items():
            for sample, rows in zip(context, real, strict=True):
                _add(found, name, sample, sample, np.flatnonzero(rows), np.flatnonzero(rows))
    return found


def benign_moments(
    reader: ContextReader, bad: DebuggingSet, heads: Sequence[Head]
) -> dict[str, Moments]:
    """Contexts of bad inputs, which should be what `heads` give under their benign maps."""
    found: dict[str, Moments] = {}
    pairs = zip(reader.over(bad.bad), reader.over(bad.bad, heads), strict=True)
    for before, after in pairs:
        for name, (context, real) in before.items():
            for was, now, rows in zip(context, after[name][0], real, strict=True):
                index = np.flatnonzero(rows)
                _add(found, name, was, now, index, index)
    return found


def twin_moments(reader: ContextReader, bad: DebuggingSet) -> dict[str, Moments]:
    """Contexts of bad inputs, which should be those of their clean twins, token by token."""
    assert bad.clean is not None
    found: dict[str, Moments] = {}
    start = 0
    for batch, twins in zip(reader.over(bad.bad), reader.over(bad.clean), strict=True):
        for name, (context, real) in batch.items():
            twin, twin_real = twins[name]
            marked = bad.marked(start, len(context))
            for i, sample in enumerate(context):
                marks = None if marked is None else marked[i]
                rows = paired_rows(real[i], twin_real[i], marks)
                _add(found, name, sample, twin[i], *rows)
        start += len(next(iter(batch.values()))[0])
    return found


def paired_rows(
    real: NDArray[np.bool_], twin_real: NDArray[np.bool_], marked: NDArray[np.bool_] | None
) -> tuple[Rows, Rows]:
    """Rows of a bad input and the rows of its twin that hold the same tokens.

    Without its marked tokens the bad input is its twin; where the two still differ in length, only
    the first and the last token are sure to be the same.
    """
    own, others = np.flatnonzero(real), np.flatnonzero(twin_real)
    if marked is not None and len(marked) >= len(real):
        kept = np.flatnonzero(real & ~marked[len(marked) - len(real) :])
        own = kept if len(kept) == len(others) else own
    if len(own) != len(others):
        own, others = own[[0, -1]], others[[0, -1]]
    return own, others


def _add(
    found: dict[str, Moments],
    name: str,
    sample: FloatArray,
    wanted: FloatArray,
    rows: Rows,
    wanted_rows: Rows,
) -> None:
    """Add pairs of one sample's contexts `[Q, H, D]` and how they should change."""
    x = sample[rows].reshape(len(rows), -1)
    y = wanted[wanted_rows].reshape(len(rows), -1) - x
    weight = np.full(len(rows), 1 / max(len(rows) - 2, 1))
    weight[[0, -1]] = 1.0
    if name not in found:
        found[name] = Moments.empty(x.shape[1])
    found[name].add(x, y, weight)


def entries_of(heads: Sequence[int], chosen: Sequence[int], size: int) -> NDArray[np.int64]:
    """Where the entries of `chosen` heads are in vectors of all `heads` of `size` each."""
    places = [heads.index(head) for head in chosen]
    return np.concatenate([np.arange(size) + place * size for place in places])


def by_site(heads: Sequence[Head], order: Sequence[Site]) -> Mapping[str, list[int]]:
    """The heads of each site, sites in order."""
    found = {site.name: sorted(h for s, h in heads if s == site.name) for site in order}
    return {name: own for name, own in found.items() if own}

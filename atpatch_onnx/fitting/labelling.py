"""Which columns of a bad input are anomalous: where the trigger sits and the site over-attends it.

Late layers have mixed the trigger into other tokens; columns there that only carry the trigger's
position teach noise, so a column counts only where its share at least doubles: in the mean, in the
row that decides, or, of a column that is marked, in the head that attends to it most.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..data import Samples
from ..passes.features import BASIC, HIDDEN
from ..passes.locate import Site
from ..runtime import Array
from .job import Job
from .statistics import FeatureReader, Found, Whitening

DOUBLED = math.log(2)
"""Least rise of a log share over its clean mean."""
OUTLIER = 1.0
"""Least whitened rise, where nothing says which columns are bad."""
STILL = 1e-3
"""A log share that moved less than this against its row has not moved."""
LOCAL = 0.5
"""More than this share of moved columns is no place."""


def over_attended(
    whitening: Whitening, site: Site, found: Found, marked: NDArray[np.bool_] | None
) -> NDArray[np.bool_]:
    """The anomalous columns of bad inputs at one site, `[B * W, K]`.

    marked: bool `[B, K]`, the columns where the trigger sits; where they do not fit the site's
    maps, or there are none, columns must be outliers against clean statistics too.
    """
    row = "last_row" if site.facts.causal else "first_row"
    told = fits(found, marked)
    # One head that falls for the trigger hardly shows in the mean over all of them; where nothing
    # says which columns are bad, the most of many heads is too often chance.
    names = ("mean", "head_maximum", row) if told else ("mean", row)
    rows = [whitening.features.index(name) for name in names]
    rise = whitening.distance(site.name, found)[:, rows]
    visible = found.bucket != HIDDEN
    # A column below the uniform share is not over-attended, however much it has risen.
    uniform = -0.5 * np.log(np.maximum(visible.sum(axis=1), 1))[:, None, None]
    share = found.features[:, rows]
    risen = (rise >= DOUBLED) & (share >= uniform) & visible[:, None]
    if told:
        assert marked is not None
        return np.asarray(risen.any(axis=1) & marked)
    outlier = whitening.whitened(site.name, found)[:, rows] >= OUTLIER
    return np.asarray((risen & outlier).any(axis=1))


def fits(found: Found, marked: NDArray[np.bool_] | None) -> bool:
    """Whether marks of key positions are columns of these maps."""
    return marked is not None and marked.shape == found.bucket.shape


def moved_columns(job: Job, bad: Samples, clean: Samples) -> NDArray[np.bool_] | None:
    """Where inputs differ from their twins, as columns `[N, K]` of the first site's maps.

    A token that alone has changed moves its own column in every row, and all other columns of a
    row by one common factor, from the softmax. So a column has moved where its log share moved
    otherwise than the median of its row, in most rows. None where this points at no place: windows,
    lengths that change, a trigger all over the input.
    """
    reader = FeatureReader(replace(job, sites=job.sites[:1]), BASIC, maps="whole")
    name = job.sites[0].name
    moved = []
    for one, other in zip(reader.over(bad), reader.over(clean), strict=True):
        now, was = one[name].map, other[name].map
        assert now is not None
        assert was is not None
        if now.shape != was.shape or one[name].windows != 1 or now.shape[-1] == 1:
            return None
        moved.append(_moved(now, was))
    if len({part.shape[1] for part in moved}) != 1:
        return None
    columns = np.concatenate(moved)
    return columns if 0 < columns.mean() <= LOCAL else None


def _moved(now: Array, was: Array) -> NDArray[np.bool_]:
    """`[B, K]` of two maps `[B, H, Q, K]`."""
    seen = (now > 0) & (was > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        change = np.where(seen, np.log(now) - np.log(was), np.nan).astype(np.float64)
    with np.errstate(all="ignore"):
        aside = np.abs(change - np.nanmedian(change, axis=3, keepdims=True))
        by_column = np.nan_to_num(np.nanmedian(aside, axis=(1, 2)))
    largest = by_column.max(axis=1, keepdims=True)
    return np.asarray(by_column > np.maximum(STILL, 0.05 * largest))

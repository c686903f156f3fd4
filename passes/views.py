"""A site's probabilities, of whatever rank, as detectors and redistribution want them."""

from __future__ import annotations

from .fragment import Fragment
from .locate import Site


def view_4d(f: Fragment, site: Site) -> str:
    """The probabilities as `[B, H, Q, K]`: leading axes but the heads are samples.

    A 3-D map `[B*H, Q, K]` needs the number of heads; where nobody knows it, every head is taken
    for a sample of its own.
    """
    value = site.probabilities
    if site.rank == 4:
        return value
    if site.rank == 2:
        return f.axes_op("Unsqueeze", value, [0, 1], "map")
    known = site.facts.heads or 1
    if site.rank == 3 and known == 1:
        return f.axes_op("Unsqueeze", value, [1], "map")
    shape = f.op("Shape", value, name="shape")
    if site.rank == 3:
        tail = f.slice(shape, 1, 3, 0, "queries_keys")
        target = f.op("Concat", f.ints(-1, known), tail, name="map_shape", axis=0)
    else:
        tail = f.slice(shape, 2, 5, 0, "heads_queries_keys")
        target = f.op("Concat", f.ints(-1), tail, name="map_shape", axis=0)
    return f.op("Reshape", value, target, name="map")


def as_before(f: Fragment, site: Site, whole: str) -> str:
    """What was viewed as `[B, H, Q, K]` in the shape of the site's probabilities."""
    if site.rank == 4:
        return whole
    original = f.op("Shape", site.probabilities, name="original_shape")
    return f.op("Reshape", whole, original, name="probabilities_as_before")

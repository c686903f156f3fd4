"""A site's probabilities, of whatever rank, as detectors and redistribution want them, and back."""

from __future__ import annotations

from dataclasses import replace

from onnx import TensorProto

from .fragment import Fragment
from .locate import Site
from .opening.steps import length, spread_rows, take_rows

OPENED = "opened"
"""Before the names of nodes that a fused operator is opened into."""


NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def in_floats(f: Fragment, site: Site) -> Site:
    """The site with probabilities in float that a patch may read as often as it likes.

    Integers are dequantised, 16 bits cast to float32. The host's value gets a single reader, an
    Abs, because ONNX Runtime's CPU provider computes other bits where it has several: it turns int8
    into uint8 only around a DequantizeLinear with one reader (and aborts where an `If` reads one
    behind a Slice or Reshape), and drops 16-bit roundings only on single ways, around operators
    without a 16-bit kernel.
    """
    if not site.grid and not _is_narrow(site):
        return site
    value = site.probabilities
    if site.integers:
        value = f.op("DequantizeLinear", value, *site.grid, name="dequantized_map")
    value = f.op("Abs", value, name="alone")
    elem_type = site.elem_type
    if _is_narrow(site):
        elem_type = TensorProto.FLOAT
        value = f.cast(value, elem_type, "in_floats")
    return replace(site, probabilities=value, elem_type=elem_type, grid=(), integers=False)


def as_held(f: Fragment, site: Site, result: str) -> str:
    """New probabilities in the type and on the grid of the host's; what was on it stays there.

    The runtime computes a P V in integers that follows a DequantizeLinear. It must go on doing so,
    also for what is not flagged.
    """
    if _is_narrow(site):
        # A cast of ours is a rounding to keep. Those around an Abs are the CPU provider's own.
        result = f.op("Abs", f.cast(result, site.elem_type, "narrow"), name="narrowed")
    if not site.grid:
        return result
    integers = f.op("QuantizeLinear", result, *site.grid, name="quantized")
    if site.integers:
        return integers
    return f.op("DequantizeLinear", integers, *site.grid, name="dequantized")


def _is_narrow(site: Site) -> bool:
    """Whether plain nodes hold the probabilities in 16 bits."""
    return site.opening is None and site.elem_type in NARROW


def view_4d(f: Fragment, site: Site) -> str:
    """The probabilities as `[B, H, Q, K]`: leading axes but the heads are samples.

    A 3-D map `[B*H, Q, K]` needs the number of heads; where nobody knows it, every head is taken
    for a sample of its own.
    """
    if site.opening is not None:
        return site.opening.probabilities(f.within(OPENED))
    value = in_floats(f, site).probabilities
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


def sampled(f: Fragment, site: Site, rows: int | None, whole: str | None = None) -> str:
    """What a detector sees: the map, or `rows` query rows of it, `[B, H, rows, K]`.

    whole: the map, where it is there already; a fused operator then computes no other.
    """
    if rows is None:
        return whole or view_4d(f, site)
    if whole is None and site.opening is not None:
        return site.opening.probabilities(f.within(OPENED), rows)
    whole = whole or view_4d(f, site)
    apart = f.within("rows")
    indices = spread_rows(apart, length(apart, whole, 2, "queries"), rows)
    return take_rows(apart, whole, indices, 4, "sampled")


def as_before(f: Fragment, site: Site, whole: str) -> str:
    """What was viewed as `[B, H, Q, K]` in the shape of the site's probabilities."""
    if site.rank == 4:
        return whole
    original = f.op("Shape", site.probabilities, name="original_shape")
    return f.op("Reshape", whole, original, name="probabilities_as_before")

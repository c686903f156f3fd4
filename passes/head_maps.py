"""Maps of heads without padding: how alike heads are, and their benign maps.

Nodes that fitting and serving share, as those of `features`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from .features import add_features
from .fragment import Fragment
from .tables import unsqueeze

Floats = NDArray[np.float32]

MEAN, CLOSEST = "mean", "closest"
WITHOUT_SINKS = "-without-sinks"
SIMILARITIES = (MEAN, CLOSEST, MEAN + WITHOUT_SINKS, CLOSEST + WITHOUT_SINKS)
"""How alike a head is to the others: on average, or to the closest; of whole maps or without the
columns of attention sinks."""
OLDEST_OPSET = 10
"""The first whose Slice has computed bounds, which find the rows of padding."""
NO_LENGTH = 1e-12
"""A map without mass has this length, so that it is like no other."""


@dataclass(frozen=True)
class NormalSite:
    """A site and what is normal there; P are positions, or position buckets.

    heads: how many; cross: its keys are another sequence than its queries, which then have no
    padding to leave out.
    buckets: whether lengths vary. sinks: bool `[P]`, columns that clean inputs over-attend.
    benign: the clean mean, `[H, P]` or `[H, Q, P]`; relative to the uniform share where positions
    are buckets; None: none is stored.
    """

    name: str
    heads: int
    cross: bool
    buckets: bool
    sinks: NDArray[np.bool_]
    benign: Floats | None = None


@dataclass(frozen=True)
class Masked:
    """Values of a map without padding.

    keys: float32 `[B, 1, 1, K]`, 1 where a key is no padding; map: `[B, H, Q, K]`, zero in padding.
    columns: `[B, H, K]`, mean of each column over the rows that are no padding.
    bucket: int64 `[B, K]`; count: float32 `[B, 1]`, how many keys are no padding.
    """

    keys: str
    map: str
    columns: str
    bucket: str
    count: str


def add_keys(f: Fragment, attention: str) -> str:
    """Add nodes that tell which keys are no padding, float32 `[B, 1, 1, K]`: 1 where one is none.

    The last query row sees them all: in a causal site it is the last token's, and elsewhere all
    rows see the same keys.
    """
    last = f.slice(attention, -1, 2**31 - 1, 2, "last_row")
    seen = f.axes_op("ReduceMax", last, [1], "seen_by_last_row", keepdims=1)
    some = f.op("Greater", seen, f.number(0.0), name="is_key")
    return f.cast(some, TensorProto.FLOAT, "real_keys")


def add_masked(f: Fragment, attention: str, cross: bool) -> Masked:
    """Add nodes that leave padding out of `attention` `[B, H, Q, K]`.

    cross: rows have no key of their own; else row i is that of key K - Q + i.
    """
    keys = add_keys(f, attention)
    masked = f.op("Mul", attention, keys, name="without_padding_keys")
    scale = ""
    if not cross:
        shape = f.op("Shape", attention, name="map_shape")
        queries, end = (f.slice(shape, i, i + 1, 0, f"dimension{i}") for i in (2, 3))
        start = f.op("Sub", end, queries, name="first_own_key")
        own = f.op("Slice", keys, start, end, f.ints(3), name="own_keys")
        rows = f.op("Transpose", own, name="real_rows", perm=[0, 1, 3, 2])
        masked = f.op("Mul", masked, rows, name="without_padding")
        share = f.axes_op("ReduceMean", rows, [2, 3], "real_row_share", keepdims=0)
        some = f.op("Max", share, f.number(NO_LENGTH), name="some_real_rows")
        scale = f.axes_op("Unsqueeze", some, [2], "real_row_share_columns")
    found = add_features(f.within("features"), masked, ("mean",))
    columns = found.columns
    if scale:
        columns = f.op("Div", columns, scale, name="real_column_means")
    return Masked(keys, masked, columns, found.bucket, found.visible_count)


def add_similarity(f: Fragment, masked: Masked, site: NormalSite, kind: str) -> str:
    """Add nodes for how alike each head is to the others, `[B, H]`, by one of `SIMILARITIES`."""
    f = f.within(kind)
    value = masked.map
    if kind.endswith(WITHOUT_SINKS):
        value = f.op("Mul", value, _without_sinks(f, masked, site), name="without_sinks")
    flat = f.op("Reshape", value, f.ints(0, 0, -1), name="flat")
    squares = f.op("Mul", flat, flat, name="squares")
    length = f.op("Sqrt", f.axes_op("ReduceSum", squares, [2], "square", keepdims=1), name="length")
    some = f.op("Max", length, f.number(NO_LENGTH), name="some_length")
    unit = f.op("Div", flat, some, name="unit")
    across = f.op("Transpose", unit, name="unit_across", perm=[0, 2, 1])
    pairs = f.op("MatMul", unit, across, name="cosines")
    own = np.eye(site.heads, dtype=np.float32)
    if kind.startswith(CLOSEST):
        apart = f.op("Sub", pairs, f.constants.add(f"2own{site.heads}", 2 * own), name="others")
        return f.axes_op("ReduceMax", apart, [2], "similarity", keepdims=0)
    share = (1 - own) / max(site.heads - 1, 1)
    others = f.op("Mul", pairs, f.constants.add(f"others{site.heads}", share), name="others")
    return f.axes_op("ReduceSum", others, [2], "similarity", keepdims=0)


def _without_sinks(f: Fragment, masked: Masked, site: NormalSite) -> str:
    """1 at columns that are no sinks, `[B, 1, 1, K]`."""
    table = f.constants.add(f"{site.name}/no_sinks", (~site.sinks).astype(np.float32))
    if site.buckets:
        table = f.op("Gather", table, masked.bucket, name="no_sinks", axis=0)
        return f.axes_op("Unsqueeze", table, [1, 2], "no_sink_columns")
    return f.axes_op("Unsqueeze", table, [0, 1, 2], "no_sink_columns")


def add_benign_heads(f: Fragment, masked: Masked, site: NormalSite, output: str) -> list[NodeProto]:
    """The node that makes the benign maps `output` `[B or 1, H, 1 or Q, K]`; or none."""
    if site.benign is None:
        return []
    table = f.constants.add(f"{site.name}/benign", site.benign.astype(np.float32))
    if not site.buckets:
        return [unsqueeze(f, table, [0] if site.benign.ndim == 3 else [0, 2], output)]
    picked = f.op("Gather", table, masked.bucket, name="benign_picked", axis=1)
    shares = f.op("Transpose", picked, name="benign_by_column", perm=[1, 0, 2])
    count = f.axes_op("Unsqueeze", masked.count, [2], "count_columns")
    some = f.op("Max", count, f.number(1.0), name="some_count")
    return [unsqueeze(f, f.op("Div", shares, some, name="benign_share"), [2], output)]

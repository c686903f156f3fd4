"""Column features: what a detector looks at, authored once for fitting and for serving.

A map of `[B, H, Q, K]` is reduced to four numbers a column, in one pass over it. Fitting runs
these nodes inside ONNX Runtime and reads them as outputs; the fitted detector contains the same
nodes. There is no second implementation that could differ.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx import TensorProto

from .fragment import Fragment

FEATURES = ("mean", "head_maximum", "first_row", "last_row")
"""Log shares of a column, relative to the uniform share 1 / (number of visible keys):
its mean over heads and queries; its mean over queries in the head that attends to it most; its
head mean in the first row ([CLS] decides there) and in the last row (a decoder decides there)."""

FIRST, SECOND, INTERIOR, LAST, HIDDEN = range(5)
BUCKETS = 5
"""Position buckets for sequences of variable length; HIDDEN columns are seen by no query."""

FLOOR = 1e-9
"""Shares below this count as this: log(0) has no statistics."""


@dataclass(frozen=True)
class Features:
    """Values that hold the features of one map.

    columns: float32 `[B, H, K]`, the mean of each column over queries.
    features: float32 `[B, 4, K]`, in the order of `FEATURES`.
    visible_count: float32 `[B, 1]`, how many keys any query sees.
    bucket: int64 `[B, K]`, the position bucket of each column; "" where it was not asked for.
    """

    columns: str
    features: str
    visible_count: str
    bucket: str = ""


def add_features(f: Fragment, attention: str, buckets: bool = True) -> Features:
    """Add the feature nodes for `attention`, float32 `[B, H, Q, K]`; `buckets` with positions."""
    columns = f.axes_op("ReduceMean", attention, [2], "column_means", keepdims=0)
    mean = f.axes_op("ReduceMean", columns, [1], "column_mean", keepdims=1)
    rows = [mean, f.axes_op("ReduceMax", columns, [1], "column_head_maximum", keepdims=1)]
    for name, start, end in (("first_row", 0, 1), ("last_row", -1, 2**31 - 1)):
        row = f.slice(attention, start, end, 2, f"{name}s")
        flat = f.axes_op("Squeeze", row, [2], f"{name}_heads")
        rows.append(f.axes_op("ReduceMean", flat, [1], name, keepdims=1))
    shares = f.op("Concat", *rows, name="shares", axis=1)
    column = f.axes_op("Squeeze", mean, [1], "column_mean_flat")
    seen = f.op("Greater", column, f.number(0.0), name="column_visible")
    ones = f.cast(seen, TensorProto.FLOAT, "column_visible_ones")
    count = f.axes_op("ReduceSum", ones, [1], "visible_count", keepdims=1)
    relative = f.op(
        "Mul",
        shares,
        f.axes_op("Unsqueeze", count, [2], "visible_count_column"),
        name="relative_shares",
    )
    floored = f.op("Max", relative, f.number(FLOOR), name="floored_shares")
    features = f.op("Log", floored, name="features")
    bucket = _bucket(f, seen, ones, count) if buckets else ""
    return Features(columns, features, count, bucket)


def _bucket(f: Fragment, seen: str, ones: str, count: str) -> str:
    """The position bucket of each column, counted over visible columns only."""
    place = _running_count(f, ones)
    buckets = [f.ints(bucket) for bucket in range(BUCKETS)]

    def below(bound: str, name: str) -> str:
        return f.op("Less", place, bound, name=name)

    before_last = f.op("Sub", count, f.number(0.5), name="before_last")
    inner = f.op(
        "Where",
        below(f.number(2.5), "is_second"),
        buckets[SECOND],
        buckets[INTERIOR],
        name="second_or_interior",
    )
    inner = f.op(
        "Where", below(before_last, "is_inner"), inner, buckets[LAST], name="inner_or_last"
    )
    inner = f.op(
        "Where", below(f.number(1.5), "is_first"), buckets[FIRST], inner, name="first_or_later"
    )
    return f.op("Where", seen, inner, buckets[HIDDEN], name="bucket")


def _running_count(f: Fragment, ones: str) -> str:
    """Cumulative sum of `ones` `[B, K]` along K; below opset 11, which lacks CumSum, a product."""
    if f.opset >= 11:
        return f.op("CumSum", ones, f.ints(1), name="place")
    row = f.slice(ones, 0, 1, 0, "one_row")
    anything = f.op("Add", f.op("Abs", row, name="one_row_abs"), f.number(1.0), name="filled_row")
    positions = f.cast(
        f.op("NonZero", anything, name="row_positions"), TensorProto.FLOAT, "row_positions_float"
    )
    across = f.slice(positions, 1, 2, 0, "position_row")
    down = f.op("Transpose", across, name="position_column", perm=[1, 0])
    later = f.op(
        "Less", down, f.op("Add", across, f.number(0.5), name="position_row_end"), name="not_later"
    )
    return f.op("MatMul", ones, f.cast(later, TensorProto.FLOAT, "not_later_ones"), name="place")

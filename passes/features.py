"""Column features: what a detector looks at, authored once for fitting and for serving.

A map of `[B, H, Q, K]` is reduced to a few numbers a column. Fitting runs these nodes inside ONNX
Runtime and reads them as outputs; the fitted detector contains the same nodes. There is no second
implementation that could differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnx import TensorProto

from .fragment import Fragment

BASIC = ("mean", "head_maximum", "first_row", "last_row")
"""Logs of a column's share of attention, times the root of the number of visible keys:
its mean over heads and queries; its mean over queries in the head that attends to it most; its
head mean in the first row ([CLS] decides there) and in the last row (a decoder decides there). One
pass over the map."""

RICH = (
    *BASIC,
    "head_minimum",
    "first_row_maximum",
    "first_row_minimum",
    "last_row_maximum",
    "last_row_minimum",
    "peak",
    "trough",
)
"""And: its mean over queries in the head that attends to it least; the first and the last row in
the heads with the largest and the smallest share; head means of its largest and of its smallest
share over all queries. Three passes over the map."""

FIRST, SECOND, INTERIOR, LAST, HIDDEN = range(5)
BUCKETS = 5
"""Position buckets for sequences of variable length; HIDDEN columns are seen by no query."""

FLOOR = 1e-9
"""Shares below this count as this: log(0) has no statistics."""


@dataclass(frozen=True)
class Features:
    """Values that hold the features of one map.

    columns: float32 `[B, H, K]`, the mean of each column over queries.
    features: float32 `[B, F, K]`, in the order of the names asked for.
    visible_count: float32 `[B, 1]`, how many keys any query sees.
    bucket: int64 `[B, K]`, the position bucket of each column; "" where it was not asked for.
    """

    columns: str
    features: str
    visible_count: str
    bucket: str = ""


def add_features(
    f: Fragment, attention: str, names: Sequence[str] = BASIC, buckets: bool = True
) -> Features:
    """Add nodes for the features `names` of `attention`, float32 `[B, H, Q, K]`.

    buckets: with the position bucket of each column.
    """
    columns = f.axes_op("ReduceMean", attention, [2], "column_means", keepdims=0)
    rows = _Rows(f, attention, columns)
    mean = rows("mean")
    shares = f.op("Concat", *(rows(name) for name in names), name="shares", axis=1)
    column = f.axes_op("Squeeze", mean, [1], "column_mean_flat")
    seen = f.op("Greater", column, f.number(0.0), name="column_visible")
    ones = f.cast(seen, TensorProto.FLOAT, "column_visible_ones")
    count = f.axes_op("ReduceSum", ones, [1], "visible_count", keepdims=1)
    # Where lengths vary, a word of a long text easily has many times the uniform share 1 / count,
    # and one of a short text much of all attention; the root is halfway between the two measures.
    root = f.op("Sqrt", f.axes_op("Unsqueeze", count, [2], "visible_count_column"), name="root")
    relative = f.op("Mul", shares, root, name="relative_shares")
    floored = f.op("Max", relative, f.number(FLOOR), name="floored_shares")
    features = f.op("Log", floored, name="features")
    bucket = _bucket(f, seen, ones, count) if buckets else ""
    return Features(columns, features, count, bucket)


_ROWS = {
    f"{row}{suffix}": (row, over_heads)
    for row in ("first_row", "last_row")
    for suffix, over_heads in (
        ("", "ReduceMean"),
        ("_maximum", "ReduceMax"),
        ("_minimum", "ReduceMin"),
    )
}
"""Features of one row: which, and how its heads are joined."""


class _Rows:
    """The share `[B, 1, K]` of each column, by the name of the feature; each is added once."""

    def __init__(self, f: Fragment, attention: str, columns: str) -> None:
        self.f, self.attention, self.columns = f, attention, columns
        self.made: dict[str, str] = {}

    def __call__(self, name: str) -> str:
        """The value of the feature `name`."""
        if name not in self.made:
            self.made[name] = self._add(name)
        return self.made[name]

    def _add(self, name: str) -> str:
        if name == "mean":
            return self._over_heads("ReduceMean", self.columns, "column_mean")
        if name == "head_maximum":
            return self._over_heads("ReduceMax", self.columns, "column_head_maximum")
        if name == "head_minimum":
            return self._over_heads("ReduceMin", self.columns, "column_head_minimum")
        if name in _ROWS:
            row, over_heads = _ROWS[name]
            return self._over_heads(over_heads, self._row(row), name)
        extreme = {"peak": "ReduceMax", "trough": "ReduceMin"}[name]
        over_queries = self.f.axes_op(extreme, self.attention, [2], f"{name}s", keepdims=0)
        return self._over_heads("ReduceMean", over_queries, name)

    def _row(self, name: str) -> str:
        """One row in all heads, `[B, H, K]`."""
        start, end = (0, 1) if name == "first_row" else (-1, 2**31 - 1)
        if f"{name}_heads" not in self.made:
            row = self.f.slice(self.attention, start, end, 2, f"{name}s")
            self.made[f"{name}_heads"] = self.f.axes_op("Squeeze", row, [2], f"{name}_heads")
        return self.made[f"{name}_heads"]

    def _over_heads(self, op: str, value: str, name: str) -> str:
        return self.f.axes_op(op, value, [1], name, keepdims=1)


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

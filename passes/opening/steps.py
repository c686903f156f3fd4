"""Steps of attention that fused operators have in common.

Values are named by the caller, so that one fragment can hold several of a kind.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto

from ..fragment import Fragment


def split_heads(f: Fragment, value: str, heads: int, name: str) -> str:
    """`[B, L, H*D]` as `[B, H, L, D]`."""
    apart = f.op("Reshape", value, f.ints(0, 0, heads, -1), name=f"{name}_apart")
    return f.op("Transpose", apart, name=name, perm=[0, 2, 1, 3])


def join_heads(f: Fragment, value: str, name: str) -> str:
    """`[B, H, L, D]` as `[B, L, H*D]`."""
    last = f.op("Transpose", value, name=f"{name}_heads_last", perm=[0, 2, 1, 3])
    return f.op("Reshape", last, f.ints(0, 0, -1), name=name)


def length(f: Fragment, value: str, axis: int, name: str) -> str:
    """The length of `axis` (not negative) as an int64 vector of one."""
    return f.slice(f.op("Shape", value, name=f"{name}_shape"), axis, axis + 1, 0, name)


def positions(f: Fragment, count: str, name: str) -> str:
    """0, 1, ... below `count`, an int64 vector of one."""
    zero, one = (f.constants.add(n, np.array(v, np.int64)) for n, v in (("zero", 0), ("one", 1)))
    limit = f.axes_op("Squeeze", count, [0], f"{name}_limit")
    if f.opset >= 11:
        return f.op("Range", zero, limit, one, name=name)
    ones = f.op("Expand", f.ints(1), count, name=f"{name}_ones")
    return f.axes_op("Squeeze", f.op("NonZero", ones, name=f"{name}_found"), [0], name)


def spread_rows(f: Fragment, queries: str, rows: int) -> str:
    """Indices of `rows` query rows from the first to the last of `queries`, int64 `[rows]`.

    queries: the number of queries, an int64 vector of one. Fewer queries are taken several times.
    """
    steps = f.constants.add(f"steps{rows}", np.arange(rows, dtype=np.int64))
    last = f.op("Sub", queries, f.ints(1), name="last_row")
    scaled = f.op("Mul", steps, last, name="rows_scaled")
    return f.op("Div", scaled, f.ints(max(rows - 1, 1)), name="rows")


def take_rows(f: Fragment, value: str, rows: str | None, rank: int, name: str) -> str:
    """The rows of `[.., Q, X]`; a value with one row for all queries keeps giving it."""
    if rows is None:
        return value
    there = length(f, value, rank - 2, f"{name}_rows")
    last = f.op("Sub", there, f.ints(1), name=f"{name}_last_row")
    # Max and Min take integers from opset 12 on.
    inside = f.op("Less", rows, there, name=f"{name}_inside")
    wanted = f.op("Where", inside, rows, last, name=f"{name}_wanted")
    return f.op("Gather", value, wanted, name=name, axis=rank - 2)


def product_of_heads(f: Fragment, query: str, key: str, name: str) -> str:
    """`[B, H, Q, D]` times `[B, H, K, D]` transposed: `[B, H, Q, K]`."""
    turned = f.op("Transpose", key, name=f"{name}_key_turned", perm=[0, 1, 3, 2])
    return f.op("MatMul", query, turned, name=name)


def softcap(f: Fragment, scores: str, cap: str, name: str) -> str:
    """`cap * tanh(scores / cap)`; `cap` is a scalar of the scores' type."""
    ratio = f.op("Div", scores, cap, name=f"{name}_ratio")
    return f.op("Mul", f.op("Tanh", ratio, name=f"{name}_tanh"), cap, name=name)


def reshape_like(f: Fragment, value: str, dims: Sequence[int], name: str) -> str:
    """`value` reshaped to constant `dims` (0: as it was, -1: what is left)."""
    return f.op("Reshape", value, f.ints(*dims), name=name)


def scalar(f: Fragment, value: float, elem_type: int) -> str:
    """A scalar of any ONNX float type."""
    return f.number(value, onnx.helper.tensor_dtype_to_np_dtype(elem_type).type)


def grouped_product(
    f: Fragment, left: str, right: str, heads: int, groups: int | None, name: str
) -> str:
    """`[B, H, L, X]` times `[B, G, X, Y]`: `[B, H, L, Y]`.

    Each group of H/G heads that follow one another shares a right side, which is not repeated.
    groups: None where only the right side's shape says it at run time.
    """
    if groups == heads:
        return f.op("MatMul", left, right, name=name)
    if groups is None:
        count = length(f, right, 1, f"{name}_groups")
        target = f.op("Concat", f.ints(0), count, f.ints(-1, 0), name=f"{name}_target", axis=0)
    else:
        target = f.ints(0, groups, -1, 0)
    folded = f.op("Reshape", left, target, name=f"{name}_folded")
    product = f.op("MatMul", folded, right, name=f"{name}_of_groups")
    return f.op("Reshape", product, f.ints(0, heads, -1, 0), name=name)


def pick(f: Fragment, value: str, index: int, axis: int, name: str) -> str:
    """`value` at one `index` of `axis`, which goes."""
    at = f.constants.add(f"index{index}", np.array(index, np.int64))
    return f.op("Gather", value, at, name=name, axis=axis)


def part_of_three(
    f: Fragment, value: str, index: int, first: int | str, axis: int, name: str
) -> str:
    """Query, key or value (`index` 0 to 2) of what holds them one after the other along `axis`.

    first: the size of the query's part, which is the key's too; where it is a value, an int64
    vector of one. The value's part is what is left.
    """
    open_end = np.iinfo(np.int64).max
    if isinstance(first, int):
        end = open_end if index == 2 else (index + 1) * first
        return f.slice(value, index * first, end, axis, name)
    start = f.op("Mul", first, f.ints(index), name=f"{name}_start")
    end_at = f.ints(open_end) if index == 2 else f.op("Add", start, first, name=f"{name}_end")
    return f.op("Slice", value, start, end_at, f.ints(axis), name=name)


def as_length(f: Fragment, value: str, name: str) -> str:
    """An integer scalar or vector of one as an int64 vector of one."""
    return f.op("Reshape", f.cast(value, TensorProto.INT64, f"{name}_wide"), f.ints(1), name=name)


def first_of(f: Fragment, value: str, length: str, axis: int, name: str) -> str:
    """The first `length` (an int64 vector of one) along `axis`."""
    return f.op("Slice", value, f.ints(0), length, f.ints(axis), name=name)

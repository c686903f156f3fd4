"""The forms of `mask_index` and `key_padding_mask` of com.microsoft's attention operators.

[B]            keys from this position on are padding
[2B]           the same, then the first positions that are none
[3B+2]         the same as [B], then cumulative lengths of queries and keys
[B, K]         0: padding
[B, 1], [1, 1] where there are more keys: nothing is hidden
[B, Q, K]      0: hidden from this row
[B, 1, M, M]   0: hidden from this row, M >= K, the row counted from the first cached key
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from ..fragment import Fragment
from ..graph_view import GraphView
from ..protos import int_attribute
from . import steps


@dataclass(frozen=True)
class KeyMask:
    """A mask and what it belongs to.

    rank: of the mask, 1 to 4.
    sample: a value whose first axis is the batch.
    starts: whether [2B] and [B, 1] are among its forms.
    """

    value: str
    rank: int
    sample: str
    starts: bool = False

    def hidden(self, f: Fragment, keys: str, queries: str, rows: str | None) -> str:
        """Where it hides a key, bool, broadcastable to `[B, 1, Q, K]`.

        keys, queries: their numbers, int64 vectors of one.
        """
        if self.rank == 1:
            return self._outside(f, keys)
        mask = self.value
        if self.rank == 4:
            mask = self._square(f, keys, queries, rows)
        elif self.rank == 3:
            mask = steps.take_rows(f, mask, rows, 3, "mask_rows")
        one = f.constants.add("int32_one", np.array(1, np.int32))
        found = f.op("Less", mask, one, name="mask_hides")
        if self.rank == 4:
            return found
        if self.rank == 3:
            return f.axes_op("Unsqueeze", found, [1], "mask_heads")
        if self.starts:
            several = f.op(
                "Less", f.ints(1), steps.length(f, mask, 1, "mask_length"), name="mask_real"
            )
            found = f.op("And", found, several, name="mask_hides_some")
        return f.axes_op("Unsqueeze", found, [1, 2], "mask_heads")

    def _outside(self, f: Fragment, keys: str) -> str:
        """Positions before the start or from the end on, `[B, 1, 1, K]`."""
        batch = steps.length(f, self.sample, 0, "batch")
        bounds = f.cast(self.value, TensorProto.INT64, "mask_bounds")
        position = steps.positions(f, keys, "mask_position")
        end = self._column(f, steps.first_of(f, bounds, batch, 0, "mask_end"), "mask_ends")
        hidden = f.op("Not", f.op("Less", position, end, name="mask_inside"), name="mask_after")
        if not self.starts:
            return hidden
        size = steps.length(f, bounds, 0, "mask_size")
        twice = f.op("Add", batch, batch, name="mask_twice")
        has_starts = f.op("Equal", size, twice, name="mask_has_starts")
        # Of other lengths this is nothing or no starts, but as many numbers as there are samples.
        doubled = f.op("Concat", bounds, bounds, name="mask_doubled", axis=0)
        second = f.op("Slice", doubled, batch, twice, f.ints(0), name="mask_second")
        start = f.op("Where", has_starts, second, f.ints(0), name="mask_start")
        early = f.op("Less", position, self._column(f, start, "mask_starts"), name="mask_before")
        return f.op("Or", hidden, early, name="mask_outside")

    def _column(self, f: Fragment, value: str, name: str) -> str:
        return f.axes_op("Unsqueeze", value, [1, 2, 3], name)

    def _square(self, f: Fragment, keys: str, queries: str, rows: str | None) -> str:
        """The rows and columns of `[B, 1, M, M]` that are meant."""
        row = rows or steps.positions(f, queries, "mask_row")
        cached = f.op("Sub", keys, queries, name="mask_cached")
        row = f.op("Add", row, cached, name="mask_row_of_all")
        some = f.op("Gather", self.value, row, name="mask_rows", axis=2)
        return steps.first_of(f, some, keys, 3, "mask_keys")


def rank_of_mask(view: GraphView, mask: str) -> int | None:
    """The rank of a mask, 0 where there is none; what sums a mask over an axis is a row of ends."""
    if not mask:
        return 0
    if (rank := view.rank(mask)) is not None:
        return rank
    node = view.producer(mask)
    while node is not None and node.op_type in ("Cast", "Identity"):
        node = view.producer(node.input[0])
    if node is not None and node.op_type == "ReduceSum" and not int_attribute(node, "keepdims", 1):
        return 1
    return None

"""What ONNX `Attention` adds to its scores: its mask input, and the keys that it hides by position.

1. a query's position is its row plus the keys before its block: past_key's, or with
   nonpad_kv_seqlen those of its sample that are not padding, less the number of queries
2. is_causal, left_window_size and right_window_size compare positions -> bool [Q, K],
   with nonpad_kv_seqlen [B, 1, Q, K]
3. nonpad_kv_seqlen hides padding -> bool [B, 1, 1, K]
4. a mask that ends before the last key hides the keys behind (from opset 24 on)
5. all that is boolean together: what it hides gets -inf, what it shows the float mask or 0
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce

import numpy as np
from onnx import TensorProto

from ..fragment import Fragment
from . import steps

LOWEST: dict[int, float] = {
    TensorProto.FLOAT: float(np.finfo(np.float32).min),
    TensorProto.FLOAT16: float(np.finfo(np.float16).min),
    TensorProto.BFLOAT16: -float.fromhex("0x1.fep127"),
    TensorProto.DOUBLE: -math.inf,
}
"""A row that has no larger bias than this sees no key.

ONNX says -inf, ONNX Runtime's kernels (which have no float64 one) the lowest finite number.
"""


@dataclass(frozen=True)
class Masking:
    """The inputs and attributes of `Attention` that hide keys; "" and None are absent ones.

    mask, mask_rank (None: unknown), mask_type: the mask input; it may end early if `mask_short`.
    past, nonpad: past_key and nonpad_kv_seqlen.
    causal, left, right: is_causal, and the window in keys (-1: unlimited).
    elem_type: ONNX element type of the scores.
    """

    mask: str
    mask_rank: int | None
    mask_type: int | None
    mask_short: bool
    past: str
    nonpad: str
    causal: bool
    left: int
    right: int
    elem_type: int

    @property
    def by_place(self) -> bool:
        """Whether positions are compared."""
        return self.causal or self.left >= 0 or self.right >= 0

    @property
    def counts_keys(self) -> bool:
        """Whether the number of keys is needed."""
        return self.by_place or bool(self.nonpad) or bool(self.mask and self.mask_short)

    @property
    def hides_rows(self) -> bool:
        """Whether there can be queries that see no key at all."""
        return bool(self.mask or self.nonpad) or self.left >= 0

    def bias(self, f: Fragment, keys: str, queries: str, rows: str | None) -> str | None:
        """Add the nodes that compute what is added to the scores, broadcastable to `[B, H, Q, K]`.

        keys (where `counts_keys`), queries (where `by_place`): their numbers, int64 vectors of one;
        rows: the queries wanted, None: all.
        """
        mask = self._mask(f, keys, rows) if self.mask else None
        shown = self._shown(f, keys, queries, rows)
        if mask is not None and self.mask_type == TensorProto.BOOL:
            shown.append(mask)
            mask = None
        if not shown:
            return mask
        both = reduce(lambda a, b: f.op("And", a, b, name=f"{b.rpartition('/')[2]}_too"), shown)
        bias = mask or steps.scalar(f, 0.0, self.elem_type)
        hidden = steps.scalar(f, -math.inf, self.elem_type)
        return f.op("Where", both, bias, hidden, name="bias")

    def _shown(self, f: Fragment, keys: str, queries: str, rows: str | None) -> list[str]:
        """Which keys each rule shows, steps 1 to 3."""
        shown: list[str] = []
        if not self.by_place and not self.nonpad:
            return shown
        key = steps.positions(f, keys, "key_positions")
        if self.by_place:
            query = self._query_positions(f, queries, rows)
            last = 0 if self.causal else self.right
            if last >= 0:
                end = f.op("Add", query, f.ints(last), name="last_key") if last else query
                shown.append(f.op("LessOrEqual", key, end, name="not_later"))
            if self.left >= 0:
                start = f.op("Sub", query, f.ints(self.left), name="first_key")
                shown.append(f.op("GreaterOrEqual", key, start, name="not_earlier"))
        if self.nonpad:
            ends = f.axes_op("Unsqueeze", self.nonpad, [1, 2, 3], "real_keys")
            shown.append(f.op("Less", key, ends, name="not_padding"))
        return shown

    def _query_positions(self, f: Fragment, queries: str, rows: str | None) -> str:
        """`[Q, 1]`, or `[B, 1, Q, 1]` where samples differ."""
        row = rows or steps.positions(f, queries, "query_rows")
        column = f.axes_op("Unsqueeze", row, [1], "query_column")
        if self.past:
            before = steps.length(f, self.past, 2, "past_keys")
        elif self.nonpad:
            real = f.op("Sub", self.nonpad, queries, name="cached_keys")
            before = f.axes_op("Unsqueeze", real, [1, 2, 3], "cached_keys_each")
        else:
            return column
        return f.op("Add", column, before, name="query_positions")

    def _mask(self, f: Fragment, keys: str, rows: str | None) -> str:
        """The mask in the scores' type or as booleans, with a value for every key."""
        mask, rank = self.mask, self.mask_rank
        if rank is None:  # ones before its dims, as many as make four
            ones = f.op("Shape", mask, name="mask_shape")
            ones = f.op("Concat", f.ints(1, 1, 1, 1), ones, name="mask_dims_after_ones", axis=0)
            dims = f.slice(ones, -4, np.iinfo(np.int64).max, 0, "mask_dims")
            mask, rank = f.op("Reshape", mask, dims, name="mask_of_four"), 4
        if rank > 1:
            mask = steps.take_rows(f, mask, rows, rank, "mask_rows")
        if self.mask_type not in (TensorProto.BOOL, self.elem_type):
            mask = f.cast(mask, self.elem_type, "mask_cast")
        return self._lengthened(f, mask, rank, keys) if self.mask_short else mask

    def _lengthened(self, f: Fragment, mask: str, rank: int, keys: str) -> str:
        """Step 4. Not with `Pad`, which runtimes have for fewer types."""
        there = steps.length(f, mask, rank - 1, "mask_keys")
        missing = f.op("Sub", keys, there, name="mask_missing")
        dims = f.op("Shape", mask, name="mask_rows_shape")
        dims = f.slice(dims, 0, rank - 1, 0, "mask_rows_dims")
        shape = f.op("Concat", dims, missing, name="mask_end_shape", axis=0)
        hidden = (
            f.constants.add("false", np.array(False))
            if self.mask_type == TensorProto.BOOL
            else steps.scalar(f, -math.inf, self.elem_type)
        )
        end = f.op("Expand", hidden, shape, name="mask_end")
        return f.op("Concat", mask, end, name="mask_all", axis=rank - 1)

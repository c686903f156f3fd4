"""com.microsoft `PackedAttention` and `PackedMultiHeadAttention` in plain nodes.

    output [T, H*V] = PackedAttention(
        input [T, E], weights [E, H*D + H*D + H*V], bias, token_offset [B, Q],
        cumulative_sequence_length [B+1], attention_bias [B|1, H|1, Q, Q])
    output [T, H*V] = PackedMultiHeadAttention(
        query [T, H*D] or packed [T, H, 3, D], key [T, H*D], value [T, H*V], bias, token_offset,
        cumulative_sequence_length, attention_bias)

T tokens are what is left of B sequences of length Q when padding on the right is dropped.

    1. query, key, value of the tokens [T, X]
    2. unpacked to [B, Q, X], then [B, H, Q, D]: position i of sample b is token
       cumulative_sequence_length[b] + i. Positions of padding repeat the sample's last token.
    3. as in `scaled_dot`; keys that are padding get probability 0
    4. output [B, Q, H*V], of which the rows at the first T numbers of token_offset are kept
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from onnx import NodeProto, TensorProto

from ..fragment import Fragment
from ..graph_view import Dim, GraphView
from ..protos import int_attribute
from . import steps
from .contrib_attention import SIDES, Attention, restrictions
from .opening import Closed
from .scaled_dot import LOWEST, ScaledDot, broken, checked


@dataclass(frozen=True)
class Packing:
    """Where tokens `[T, ..]` belong: token_offset `[B, Q]`, cumulative_sequence_length `[B+1]`."""

    tokens: str
    offset: str
    cumulative: str

    def queries(self, f: Fragment) -> str:
        """Q, an int64 vector of one."""
        return steps.length(f, self.offset, 1, "queries")

    def unpacked(self, f: Fragment, tokens: str, rows: str | None, name: str) -> str:
        """Step 2: `[T, X]` as `[B, Q, X]`, or only some rows of each sample."""
        length, start = self._lengths(f, name)
        row = rows or steps.positions(
            f, steps.length(f, self.offset, 1, f"{name}_all"), name + "_row"
        )
        one = f.ints(1)
        inside = f.op("Less", row, length, name=f"{name}_inside")
        last = f.op("Sub", length, one, name=f"{name}_last")
        row = f.op("Where", inside, row, last, name=f"{name}_row_inside")
        token = f.op("Add", start, row, name=f"{name}_token")
        # An empty sample has no last token; it may take anybody's, which is then not read.
        some = f.op("Less", token, start, name=f"{name}_none")
        token = f.op("Where", some, f.ints(0), token, name=f"{name}_token_or_any")
        return f.op("Gather", tokens, token, name=name, axis=0)

    def padding(self, f: Fragment, keys: str) -> str:
        """Keys beyond the end of their sample, bool `[B, 1, 1, K]`."""
        length, _ = self._lengths(f, "mask")
        position = steps.positions(f, keys, "mask_position")
        inside = f.op("Less", position, length, name="mask_inside")
        beyond = f.op("Not", inside, name="mask_beyond")
        return f.axes_op("Unsqueeze", beyond, [1, 2], "mask_heads")

    def packed(self, f: Fragment, padded: str, name: str) -> str:
        """Step 4: `[B, Q, X]` as `[T, X]`."""
        flat = f.op("Flatten", padded, name=f"{name}_flat", axis=2)
        count = steps.length(f, self.tokens, 0, f"{name}_tokens")
        offsets = steps.reshape_like(f, self.offset, (-1,), f"{name}_offsets")
        offsets = steps.first_of(f, offsets, count, 0, f"{name}_rows")
        return f.op("Gather", flat, offsets, name=name, axis=0)

    def choose(self, f: Fragment, sample: str, new: str, old: str) -> str:
        """`new` `[T, X]` for tokens of samples where `sample` `[B, 1, 1, 1]`, else `old`."""
        column = steps.reshape_like(f, sample, (-1, 1, 1), "sample_column")
        positions = f.op("Shape", self.offset, name="offset_shape")
        shape = f.op("Concat", positions, f.ints(1), name="sample_shape", axis=0)
        padded = f.op("Expand", column, shape, name="sample_padded")
        mask = self.packed(f, padded, "of_token")
        return f.op("Where", mask, new, old, name="chosen_output")

    def _lengths(self, f: Fragment, name: str) -> tuple[str, str]:
        """How many tokens a sample has, and the first of them: int64 columns `[B, 1]`."""
        ends = f.cast(self.cumulative, TensorProto.INT64, f"{name}_cumulative")
        first = f.slice(ends, 0, -1, 0, f"{name}_firsts")
        after = f.slice(ends, 1, 2**31 - 1, 0, f"{name}_ends")
        length = f.op("Sub", after, first, name=f"{name}_lengths")
        columns = (
            f.axes_op("Unsqueeze", v, [1], f"{v.split('/')[-1]}_column") for v in (length, first)
        )
        return next(columns), next(columns)


@dataclass(frozen=True, eq=False)
class _ByToken(ScaledDot):
    """What both operators do with tokens of samples without padding."""

    @property
    @abstractmethod
    def packing(self) -> Packing:
        """Where the tokens belong."""

    def queries(self, f: Fragment) -> str:
        """Q."""
        return self.packing.queries(f)

    def padding(self, f: Fragment, keys: str, _: str | None) -> str | None:
        """Keys beyond the end of their sample."""
        return self.packing.padding(f, keys)

    def output(self, f: Fragment, probabilities: str) -> str:
        """Step 4."""
        return self.packing.packed(f, super().output(f, probabilities), "output_packed")

    def choose(self, f: Fragment, sample: str, new: str, old: str) -> str:
        """By token, since the output has no batch axis."""
        return self.packing.choose(f, sample, new, old)

    @property
    def hidden_score(self) -> float:
        """The kernels leave padding out of the softmax."""
        return LOWEST


@dataclass(frozen=True, eq=False)
class PackedAttention(_ByToken, Attention):
    """A `PackedAttention` node as plain nodes."""

    slots: ClassVar[tuple[str, ...]] = tuple(
        "input weights bias token_offset cumulative_sequence_length attention_bias".split()
    )

    def query(self, f: Fragment, rows: str | None) -> str:
        """Steps 2 and 1: only the rows that are wanted are projected."""
        some = self.packing.unpacked(f, self.named("input"), rows, "query_unpacked")
        return self.wide(f, self.projected(f, some, 0, exact=rows is None), "query_wide")

    def key(self, f: Fragment, exact: bool) -> str:
        """Steps 1 and 2."""
        return self.wide(f, self._side(f, 1, exact), "key_wide")

    def value(self, f: Fragment) -> str:
        """Steps 1 and 2."""
        return self._side(f, 2, exact=False)

    @property
    def packing(self) -> Packing:
        """Where the tokens belong."""
        return Packing(*map(self.named, ("input", "token_offset", "cumulative_sequence_length")))

    @property
    def shape(self) -> tuple[Dim, ...]:
        """`[B, H, Q, Q]`, as far as the graph says."""
        return _shape(self, self.named("token_offset"))

    def _side(self, f: Fragment, side: int, exact: bool) -> str:
        name = SIDES[side]
        tokens = self.flat(f, self.named("input"), side, exact, f"{name}_projected")
        padded = self.packing.unpacked(f, tokens, None, f"{name}_unpacked")
        return steps.split_heads(f, padded, self.heads, f"{name}_heads")


@dataclass(frozen=True, eq=False)
class PackedMultiHeadAttention(_ByToken):
    """A `PackedMultiHeadAttention` node as plain nodes."""

    slots: ClassVar[tuple[str, ...]] = tuple(
        "query key value bias token_offset cumulative_sequence_length attention_bias".split()
    )

    def named(self, name: str) -> str:
        """The name of an input of the operator; "" where it is absent."""
        return self.input(self.slots.index(name))

    def query(self, f: Fragment, rows: str | None) -> str:
        """Steps 1 and 2."""
        return self._side(f, 0, rows)

    def key(self, f: Fragment, exact: bool) -> str:  # noqa: ARG002 - nothing is projected
        """Steps 1 and 2."""
        return self._side(f, 1, None)

    def value(self, f: Fragment) -> str:
        """Steps 1 and 2."""
        return self._side(f, 2, None)

    def bias(self, _: Fragment) -> str:
        """What is added to the scores."""
        return self.named("attention_bias")

    @property
    def packing(self) -> Packing:
        """Where the tokens belong."""
        return Packing(*map(self.named, ("query", "token_offset", "cumulative_sequence_length")))

    @property
    def head_size(self) -> int | None:
        """D, where the graph says it."""
        shape = self.view.shape(self.named("query"))
        if not shape or not isinstance(shape[-1], int):
            return None
        return shape[-1] if len(shape) == 4 else shape[-1] // self.heads

    @property
    def shape(self) -> tuple[Dim, ...]:
        """`[B, H, Q, Q]`, as far as the graph says."""
        return _shape(self, self.named("token_offset"))

    def _side(self, f: Fragment, side: int, rows: str | None) -> str:
        name = SIDES[side]
        tokens = self.named(name)
        if not self.named("key"):
            apart = steps.pick(f, self.named("query"), side, 2, f"{name}_own")
            tokens = steps.reshape_like(f, apart, (0, -1), f"{name}_tokens")
        if side != 2:
            tokens = self.wide(f, tokens, f"{name}_wide")
        if self.named("bias"):
            tokens = f.op("Add", tokens, self._bias(f, side, tokens), name=f"{name}_biased")
        padded = self.packing.unpacked(f, tokens, rows, f"{name}_unpacked")
        return steps.split_heads(f, padded, self.heads, f"{name}_heads")

    def _bias(self, f: Fragment, side: int, tokens: str) -> str:
        name = f"{SIDES[side]}_bias"
        first: int | str | None = self.head_size and self.head_size * self.heads
        if not first:
            query = self.named("query") if self.named("key") else tokens
            first = steps.length(f, query, 1, f"{name}_hidden")
        part = steps.part_of_three(f, self.named("bias"), side, first, 0, name)
        return part if side == 2 else self.wide(f, part, f"{name}_wide")


def _shape(opening: ScaledDot, offset: str) -> tuple[Dim, ...]:
    batch, queries = opening.view.shape(offset) or (None, None)
    return (batch, opening.heads, queries, queries)


def open_packed_attention(view: GraphView, node: NodeProto) -> PackedAttention | Closed:
    """The opening of a `PackedAttention` node."""
    elem_type = checked(
        view,
        node,
        frozenset({"num_heads", "scale", "qkv_hidden_sizes"}),
        PackedAttention.slots[:5],
    )
    if isinstance(elem_type, Closed):
        return elem_type
    found = restrictions(view, node, PackedAttention.slots)
    if isinstance(found, Closed):
        return found
    heads = int_attribute(node, "num_heads", 0)
    return PackedAttention(node, view, elem_type, heads, causal=False, cross=False, mask_rank=0)


def open_packed_multi_head(view: GraphView, node: NodeProto) -> PackedMultiHeadAttention | Closed:
    """The opening of a `PackedMultiHeadAttention` node."""
    elem_type = checked(
        view, node, frozenset({"num_heads", "scale", "mask_filter_value"}), ["query"]
    )
    if isinstance(elem_type, Closed):
        return elem_type
    given = dict(zip(PackedMultiHeadAttention.slots, node.input, strict=False))
    needed = {"token_offset", "cumulative_sequence_length"}
    needed |= {"key", "value"} if given.get("key") or given.get("value") else set()
    for name in sorted(needed):
        if not given.get(name):
            return broken(f"lacks its input '{name}'")
    heads = int_attribute(node, "num_heads", 0)
    return PackedMultiHeadAttention(node, view, elem_type, heads, causal=False, cross=False)

"""com.microsoft `MultiHeadAttention` in plain nodes.

output, present_key, present_value, qk = MultiHeadAttention(
    query [B, Q, H*D] or packed [B, Q, H, 3, D],
    key [B, L, H*D], packed with the value [B, L, H, 2, D], or projected before [B, H, L, D],
    value [B, L, H*V] or [B, H, L, V], bias [H*D + H*D + H*V], key_padding_mask,
    attention_bias [B|1, H|1, Q, K], past_key, past_value [B, H, P or M, D],
    past_sequence_length, cache_indirection [B/W, W, M])

1. query, key, value: unpacked, plus their part of the bias, as [B, H, L, D]; keys and values
   that were projected before take no bias
2. key, value: what the cache holds before them; read from `present_key` and `present_value`
   where the node has these outputs and there are no beams
3. the rest as in `scaled_dot`
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from onnx import NodeProto, TensorProto

from ..fragment import Fragment
from ..graph_view import Dim, GraphView
from ..protos import int_attribute
from . import steps
from .caches import Cache
from .key_masks import KeyMask, rank_of_mask
from .opening import Closed
from .scaled_dot import ScaledDot, broken, checked, read_off, unknown_rank

ATTRIBUTES = frozenset({"num_heads", "unidirectional", "scale", "mask_filter_value"})
SLOTS = (
    "query key value bias key_padding_mask attention_bias past_key past_value "
    "past_sequence_length cache_indirection"
)
SIDES = ("query", "key", "value")


@dataclass(frozen=True, eq=False)
class MultiHeadAttention(ScaledDot):
    """A `MultiHeadAttention` node as plain nodes.

    key_rank: 3, 4 or 5 as above; 0 where the query holds keys and values as well.
    mask_rank: of key_padding_mask; 0 where there is none.
    """

    slots: ClassVar[tuple[str, ...]] = tuple(SLOTS.split())

    key_rank: int
    mask_rank: int

    def named(self, name: str) -> str:
        """The name of an input of the operator; "" where it is absent."""
        return self.input(self.slots.index(name))

    def query(self, f: Fragment, rows: str | None) -> str:
        """Step 1."""
        value = steps.take_rows(f, self.named("query"), rows, 3, "query_rows")
        if not self.key_rank:
            return self.unpacked(f, value, 0)
        return self.split(f, value, 0)

    def key(self, f: Fragment, exact: bool) -> str:
        """Steps 1 and 2. What `present_key` holds is rounded after the bias has been added."""
        rounded = exact and self.elem_type != TensorProto.FLOAT
        present = "" if rounded else self._from_present(f, 1)
        return self.wide(f, present, "key_present_wide") if present else self._extended(f, 1)

    def value(self, f: Fragment) -> str:
        """Steps 1 and 2."""
        return self._from_present(f, 2) or self._extended(f, 2)

    def padding(self, f: Fragment, keys: str, rows: str | None) -> str | None:
        """What key_padding_mask hides."""
        if not self.mask_rank:
            return None
        mask = KeyMask(self.named("key_padding_mask"), self.mask_rank, self.named("query"))
        return mask.hidden(f, keys, keys, rows)

    def bias(self, f: Fragment) -> str:
        """What is added to the scores; with beams, row b adds the bias of row b/W, as the kernel
        does.
        """
        bias = self.named("attention_bias")
        if not bias or not self.beams:
            return bias
        rows = steps.length(f, self.named("query"), 0, "bias_batch")
        single = f.op(
            "Equal",
            steps.length(f, self.named("query"), 1, "bias_queries"),
            f.ints(1),
            name="bias_single",
        )
        width = steps.length(f, self.beams, 1, "bias_width")
        width = f.op("Where", single, width, f.ints(1), name="bias_sharing")
        row = f.op("Div", steps.positions(f, rows, "bias_row"), width, name="bias_row_shared")
        there = f.op("Less", row, steps.length(f, bias, 0, "bias_given"), name="bias_there")
        row = f.op("Where", there, row, f.ints(0), name="bias_row_given")
        return f.op("Gather", bias, row, name="bias_of_beams", axis=0)

    @property
    def head_size(self) -> int | None:
        """D, where the graph says it."""
        query, key = (self.view.shape(self.named(name)) for name in ("query", "key"))
        for shape in (query, key):
            if shape and isinstance(shape[-1], int):
                return shape[-1] if len(shape) > 3 else shape[-1] // self.heads
        return None

    @property
    def shape(self) -> tuple[Dim, ...]:
        """`[B, H, Q, K]`, as far as the graph says."""
        query = self.view.shape(self.named("query")) or (None, None)
        key = self.view.shape(self.named("key")) or query
        keys = None if self.named("past_key") or len(key) < 3 else key[2 if len(key) == 4 else 1]
        return (query[0], self.heads, query[1], keys)

    def new_keys(self, f: Fragment, queries: str) -> str:
        """How many keys are not from a cache."""
        return self._key_length(f, "new_keys") if self.key_rank else queries

    @property
    def beams(self) -> str:
        """The cache indirection; "" where beams have nothing of their own."""
        # Without a shared buffer the kernel does not look at it.
        return self.named("cache_indirection") if self.named("past_sequence_length") else ""

    def cache(self, side: int) -> Cache:
        """The cache of keys (1) or values (2)."""
        past = self.named(("", "past_key", "past_value")[side])
        return Cache(past, self.named("past_sequence_length") if past else "", self.beams)

    def first_size(self, f: Fragment, name: str) -> int | str:
        """H*D, which is where the key's part of the bias begins."""
        if self.head_size:
            return self.heads * self.head_size
        if self.key_rank:
            return steps.length(f, self.named("query"), 2, f"{name}_hidden")
        size = steps.length(f, self.named("bias"), 0, f"{name}_bias_size")
        return f.op("Div", size, f.ints(3), name=f"{name}_hidden")

    def _from_present(self, f: Fragment, side: int) -> str:
        """What the node itself has put together; "" where it has not."""
        name, cache = SIDES[side], self.cache(side)
        if not (self.present(1) and self.present(2)) or cache.indirection:
            return ""
        return cache.within(f, self.present(side), self._key_length(f, f"{name}_added"), name)

    def _extended(self, f: Fragment, side: int) -> str:
        """The cache and what this node is given."""
        name, cache, new = SIDES[side], self.cache(side), self._new(f, side)
        if not cache.past:
            return new
        past = self._computed(f, cache.past, side, f"{name}_past_wide")
        return replace(cache, past=past).extended(f, new, name)

    def _computed(self, f: Fragment, value: str, side: int, name: str) -> str:
        """Queries and keys in float32; values stay what they are."""
        return value if side == 2 else self.wide(f, value, name)

    def _key_length(self, f: Fragment, name: str) -> str:
        given = self.named("key" if self.key_rank else "query")
        return steps.length(f, given, 2 if self.key_rank == 4 else 1, name)

    def _new(self, f: Fragment, side: int) -> str:
        """The key (1) or value (2) that this node is given, `[B, H, L, D]`."""
        if not self.key_rank:
            return self.unpacked(f, self.named("query"), side)
        if self.key_rank == 5:
            pair = steps.pick(f, self.named("key"), side - 1, 3, f"{SIDES[side]}_unpacked")
            return self._turned(f, pair, side)
        return self.given(f, side)

    def given(self, f: Fragment, side: int) -> str:
        """A key (1) or value (2) that is an input of its own, `[B, H, L, D]`."""
        name = SIDES[side]
        if self.key_rank == 4:
            return self._computed(f, self.named(name), side, f"{name}_wide")
        return self.split(f, self.named(name), side)

    def unpacked(self, f: Fragment, packed: str, side: int) -> str:
        """One of three out of `[B, L, H, 3, D]`."""
        return self._turned(f, steps.pick(f, packed, side, 3, f"{SIDES[side]}_unpacked"), side)

    def _turned(self, f: Fragment, value: str, side: int) -> str:
        """`[B, L, H, D]` plus its bias, as `[B, H, L, D]`."""
        name = SIDES[side]
        value = self._computed(f, value, side, f"{name}_wide")
        if self.named("bias"):
            bias = steps.reshape_like(
                f, self._bias(f, side), (self.heads, -1), f"{name}_bias_heads"
            )
            value = f.op("Add", value, bias, name=f"{name}_biased")
        return f.op("Transpose", value, name=f"{name}_heads", perm=[0, 2, 1, 3])

    def split(self, f: Fragment, value: str, side: int) -> str:
        """`[B, L, H*D]` plus its bias, as `[B, H, L, D]`."""
        name = SIDES[side]
        value = self._computed(f, value, side, f"{name}_wide")
        if self.named("bias"):
            value = f.op("Add", value, self._bias(f, side), name=f"{name}_biased")
        return steps.split_heads(f, value, self.heads, f"{name}_heads")

    def _bias(self, f: Fragment, side: int) -> str:
        name = f"{SIDES[side]}_bias"
        first = self.first_size(f, name)
        part = steps.part_of_three(f, self.named("bias"), side, first, 0, name)
        return self._computed(f, part, side, f"{name}_wide")


def open_multi_head(view: GraphView, node: NodeProto) -> MultiHeadAttention | Closed:
    """The opening of a `MultiHeadAttention` node."""
    inputs = dict(zip(MultiHeadAttention.slots, node.input, strict=False))
    elem_type = checked(view, node, ATTRIBUTES, ["query"])
    if isinstance(elem_type, Closed):
        return elem_type
    key_rank = rank_of_key(view, inputs)
    if isinstance(key_rank, Closed):
        return key_rank
    mask = inputs.get("key_padding_mask", "")
    mask_rank = rank_of_mask(view, mask)
    if mask_rank is None or mask_rank > 3:
        return unknown_rank("a key_padding_mask")
    query = node.input[0]
    masks = f"{inputs.get('attention_bias', '')} {mask}"
    facts = read_off(view, node, query, inputs.get("key") or query, masks)
    return MultiHeadAttention(
        node,
        view,
        elem_type,
        heads=int_attribute(node, "num_heads", 0),
        causal=facts.causal,
        cross=facts.cross,
        key_rank=key_rank,
        mask_rank=mask_rank,
    )


def rank_of_key(view: GraphView, inputs: dict[str, str]) -> Closed | int:
    """3, 4 or 5; 0 where the query holds keys and values as well."""
    key, value = inputs.get("key", ""), inputs.get("value", "")
    if bool(inputs.get("past_key")) != bool(inputs.get("past_value")):
        return broken("has only one of past_key and past_value")
    if not key:
        return broken("lacks its input 'key'") if value else 0
    rank = view.rank(key) or view.rank(value) if value else view.rank(key) or 5
    if not value and rank != 5:
        return broken("lacks its input 'value'")
    return rank if rank in (3, 4, 5) else unknown_rank("a key")

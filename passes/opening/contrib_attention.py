"""com.microsoft `Attention` in plain nodes.

output, present = Attention(
    input [B, Q, E], weights [E, H*D + H*D + H*V], bias [H*D + H*D + H*V], mask_index,
    past [2, B, H, P or M, D], attention_bias [B|1, H|1, Q, K], past_sequence_length)

1. query, key, value: input times a slice of the weights, plus a slice of the bias, as
   [B, H, Q, D]; the weights stay as they are
2. key, value: what the cache holds before them; read from `present` where the node has it
3. the rest as in `scaled_dot`
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from onnx import NodeProto, TensorProto

from ..fragment import Fragment
from ..graph_view import Dim, GraphView
from ..protos import attribute, int_attribute
from . import steps
from .caches import Cache
from .key_masks import KeyMask, rank_of_mask
from .opening import Closed
from .scaled_dot import ScaledDot, broken, checked, read_off, unknown_rank

ATTRIBUTES = frozenset(
    "num_heads unidirectional scale mask_filter_value qkv_hidden_sizes past_present_share_buffer "
    "do_rotary rotary_embedding_dim".split()
)
SIDES = ("query", "key", "value")


@dataclass(frozen=True, eq=False)
class Attention(ScaledDot):
    """An `Attention` node as plain nodes. mask_rank: of mask_index; 0 where there is none."""

    slots: ClassVar[tuple[str, ...]] = tuple(
        "input weights bias mask_index past attention_bias past_sequence_length".split()
    )

    mask_rank: int

    def named(self, name: str) -> str:
        """The name of an input of the operator; "" where it is absent."""
        return self.input(self.slots.index(name)) if name in self.slots else ""

    def query(self, f: Fragment, rows: str | None) -> str:
        """Step 1."""
        some = steps.take_rows(f, self.named("input"), rows, 3, "query_rows")
        return self.wide(f, self.projected(f, some, 0, exact=rows is None), "query_wide")

    def key(self, f: Fragment, exact: bool) -> str:
        """Steps 1 and 2. What `present` holds is rounded."""
        rounded = exact and self.elem_type != TensorProto.FLOAT
        present = "" if rounded else self._from_present(f, 1)
        return self.wide(f, present or self._extended(f, 1, exact), "key_wide")

    def value(self, f: Fragment) -> str:
        """Steps 1 and 2."""
        return self._from_present(f, 2) or self._extended(f, 2, exact=False)

    def padding(self, f: Fragment, keys: str, rows: str | None) -> str | None:
        """What mask_index hides."""
        if not self.mask_rank or self._hides_nothing:
            return None
        mask = KeyMask(self.named("mask_index"), self.mask_rank, self.named("input"), starts=True)
        queries = steps.length(f, self.named("input"), 1, "mask_queries")
        return mask.hidden(f, keys, queries, rows)

    def bias(self, _: Fragment) -> str:
        """What is added to the scores."""
        return self.named("attention_bias")

    @cached_property
    def first_size(self) -> int | None:
        """H*D, the size of the query's part of the weights, where the graph says it."""
        sizes = attribute(self.node, "qkv_hidden_sizes")
        if sizes is not None and sizes.ints:
            return int(sizes.ints[0])
        for name in ("weights", "bias"):
            shape = self.dims(self.named(name))
            if shape and isinstance(shape[-1], int):
                return shape[-1] // 3
        return None

    @property
    def head_size(self) -> int | None:
        """D, where the graph says it."""
        return self.first_size and self.first_size // self.heads

    @property
    def shape(self) -> tuple[Dim, ...]:
        """`[B, H, Q, K]`, as far as the graph says."""
        given = self.view.shape(self.named("input")) or (None, None)
        return (given[0], self.heads, given[1], None if self.named("past") else given[1])

    def dims(self, value: str) -> tuple[Dim, ...] | None:
        """The shape of an activation or a weight."""
        tensor = self.view.initializers.get(value)
        return tuple(tensor.dims) if tensor is not None else self.view.shape(value)

    def projected(self, f: Fragment, rows: str, side: int, exact: bool) -> str:
        """Query, key or value (0 to 2) of some rows `[B, L, E]`, as `[B, H, L, D]`.

        exact: in float32, otherwise in the operator's type.
        """
        name = SIDES[side]
        flat = self.flat(f, rows, side, exact, f"{name}_projected")
        return steps.split_heads(f, flat, self.heads, f"{name}_heads")

    def flat(self, f: Fragment, rows: str, side: int, exact: bool, name: str) -> str:
        """`rows` times their part of the weights, plus that of the bias."""
        weights = self.part(f, "weights", side, 1, f"{name}_weights")
        if exact:
            rows = self.wide(f, rows, f"{name}_rows_wide")
            weights = self.wide(f, weights, f"{name}_weights_wide")
        product = f.op("MatMul", rows, weights, name=f"{name}_unbiased")
        if not self.named("bias"):
            return product
        bias = self.part(f, "bias", side, 0, f"{name}_bias")
        if exact:
            bias = self.wide(f, bias, f"{name}_bias_wide")
        return f.op("Add", product, bias, name=name)

    def part(self, f: Fragment, what: str, side: int, axis: int, name: str) -> str:
        """Query's, key's or value's part of an input along `axis`."""
        first: int | str | None = self.first_size
        if first is None:
            whole = steps.length(f, self.named("weights"), 1, f"{name}_sizes")
            first = f.op("Div", whole, f.ints(3), name=f"{name}_size")
        return steps.part_of_three(f, self.named(what), side, first, axis, name)

    def _from_present(self, f: Fragment, side: int) -> str:
        """What the node itself has put together; "" where it has not."""
        name = SIDES[side]
        if not self.present(1):
            return ""
        half = steps.pick(f, self.present(1), side - 1, 0, f"{name}_present")
        added = steps.length(f, self.named("input"), 1, f"{name}_added")
        return Cache("", self._filled).within(f, half, added, name)

    def _extended(self, f: Fragment, side: int, exact: bool) -> str:
        """The cache and what this node projects."""
        name = SIDES[side]
        new = self.projected(f, self.named("input"), side, exact)
        if not self.named("past"):
            return new
        half = steps.pick(f, self.named("past"), side - 1, 0, f"{name}_past")
        if exact:
            half = self.wide(f, half, f"{name}_past_wide")
        return Cache(half, self._filled).extended(f, new, name)

    @property
    def _filled(self) -> str:
        """How much of a shared buffer is valid; "" for all of it."""
        shares = int_attribute(self.node, "past_present_share_buffer", 0)
        return self.named("past_sequence_length") if shares and self.named("past") else ""

    @property
    def _hides_nothing(self) -> bool:
        """Whether mask_index is `[B, 1]` or `[1, 1]`: hidden or not, all keys are alike."""
        shape = self.dims(self.named("mask_index"))
        return self.mask_rank == 2 and shape is not None and shape[1] == 1


def open_contrib_attention(view: GraphView, node: NodeProto) -> Attention | Closed:
    """The opening of an `Attention` node."""
    elem_type = checked(view, node, ATTRIBUTES, Attention.slots[:2])
    if isinstance(elem_type, Closed):
        return elem_type
    found = restrictions(view, node, Attention.slots)
    if isinstance(found, Closed):
        return found
    masks = " ".join(name for slot, name in enumerate(node.input) if slot in (3, 5))
    return Attention(
        node,
        view,
        elem_type,
        heads=int_attribute(node, "num_heads", 0),
        causal=read_off(view, node, node.input[0], node.input[0], masks).causal,
        cross=False,
        mask_rank=found,
    )


def restrictions(view: GraphView, node: NodeProto, slots: tuple[str, ...]) -> Closed | int:
    """The rank of mask_index, 0 where there is none; why the node cannot be opened otherwise."""
    inputs = dict(zip(slots, node.input, strict=False))
    if int_attribute(node, "do_rotary", 0):
        return Closed(
            "rotates queries and keys itself (do_rotary), which ONNX Runtime defines only by its "
            "CUDA kernel",
            "export the model with com.microsoft.RotaryEmbedding and MultiHeadAttention, or with "
            "GroupQueryAttention",
        )
    sizes = attribute(node, "qkv_hidden_sizes")
    if sizes is not None and sizes.ints and (len(sizes.ints) != 3 or len(set(sizes.ints[:2])) > 1):
        return broken(f"has the qkv_hidden_sizes {list(sizes.ints)}: not three, or unequal Q and K")
    heads, shape = int_attribute(node, "num_heads", 0), view.shape(inputs.get("weights", ""))
    if sizes is None and heads and shape and isinstance(shape[-1], int) and shape[-1] % (3 * heads):
        return broken(f"has weights {list(shape)}, which {heads} heads cannot share")
    shares = int_attribute(node, "past_present_share_buffer", 0) and inputs.get("past")
    if shares and not inputs.get("past_sequence_length"):
        return broken("shares a buffer of past and present but has no past_sequence_length")
    rank = rank_of_mask(view, inputs.get("mask_index", ""))
    return unknown_rank("a mask_index") if rank is None or rank > 4 else rank

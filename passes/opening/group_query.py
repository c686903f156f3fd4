"""com.microsoft `GroupQueryAttention` in plain nodes.

    output, present_key, present_value, output_qk = GroupQueryAttention(
        query [B, Q, H*D] or packed [B, Q, (H+2G)*D], key [B, Q, G*D], value [B, Q, G*D],
        past_key, past_value [B, G, cache, D], seqlens_k [B], total_sequence_length, cos_cache,
        sin_cache [positions, R/2], position_ids [B, Q], attention_bias [B|1, H|1, Q, K],
        head_sink [H], k_scale, v_scale, q_norm_weight [D], k_norm_weight [D])

Keys and values are read from the node's own `present_key` and `present_value`: they hold the
rotated keys that the kernel used, both where a cache grows and where past and present share one
buffer. (A reader of `present_key` comes after the node, and nothing else writes there, so that a
shared buffer is safe to read; `past_key` is the one whose content would depend on the order.) They
are computed again only for a node without those outputs, which then can have no past either.

    1. query -> [B, H, Q, D]: unpacked, normalised, rotated, times the scale
    2. key: present_key up to total_sequence_length -> [B, G, K, D]
    3. scores [B, H, Q, K]: the H/G heads of a group as further rows of one product [B, G, H/G*Q, K]
    4. soft-cap, plus attention_bias
    5. a query sees the keys up to its own position in its own sequence, at most the last
       local_window_size of them; all others get probability 0
    6. softmax in float32, with exp(sink) as a further term of its denominator
    7. output: probabilities times present_value, likewise by groups -> [B, Q, H*D]

A batch is padded on the right: sample b has seqlens_k[b] + 1 tokens. What its padding queries see
is undefined (ONNX Runtime's kernels differ); here it is what the last token sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from onnx import NodeProto, TensorProto

from ..fragment import Fragment
from ..graph_view import Dim, GraphView
from ..protos import int_attribute
from . import steps
from .group_query_limits import FLOATS, KNOWN, SLOTS, unknown_value, without_map
from .known import elem_type
from .opening import Closed, Opening, float_attribute, unknown_attributes
from .reach import Queries, visible
from .rotary import rotate
from .sink import masked_softmax, sink_softmax


def open_group_query(view: GraphView, node: NodeProto) -> GroupQueryAttention | Closed:
    """The opening of a `GroupQueryAttention` node of `view`."""
    closed = unknown_attributes(node, KNOWN) or unknown_value(node) or without_map(view, node)
    if closed is not None:
        return closed
    found = [elem_type(view, value) for value in (*node.input[:5], *node.output[:3]) if value]
    kind = next((t for t in found if t in FLOATS), None)
    if kind is None:
        return Closed(
            "has tensors whose element type the graph does not tell",
            "add them to the model's value_info (onnxruntime.tools.symbolic_shape_infer)",
        )
    heads, groups = (int_attribute(node, name, 0) for name in ("num_heads", "kv_num_heads"))
    causal = bool(int_attribute(node, "causal", 1))
    return GroupQueryAttention(node, view, kind, heads, causal, cross=False, kv_heads=groups)


@dataclass(frozen=True, eq=False)
class GroupQueryAttention(Opening):
    """A `GroupQueryAttention` node as plain nodes. kv_heads: number of key and value heads."""

    kv_heads: int

    def probabilities(self, f: Fragment, rows: int | None = None) -> str:
        """Steps 1 to 6. With a sink, rows sum to less than 1."""
        queries = steps.length(f, self.named("query"), 1, "queries")
        chosen = steps.spread_rows(f, queries, rows) if rows else None
        whole = self._positions(f, "every", queries, None)
        part = self._positions(f, "chosen", queries, chosen) if chosen else whole
        scores = self._scores(f, part, whole)
        cap = float_attribute(self.node, "softcap", 0.0)
        if cap > 0:
            scores = steps.softcap(f, scores, f.number(cap), "capped")
        bias = self.named("attention_bias")
        if bias:
            some = self.wide(f, steps.take_rows(f, bias, chosen, 4, "bias_rows"), "bias")
            scores = f.op("Add", scores, some, name="biased")
        softmax = self._softmax(f, scores, self._visible(f, part))
        if self.elem_type == TensorProto.FLOAT:
            return softmax
        return f.cast(softmax, self.elem_type, "softmax_narrow")

    def output(self, f: Fragment, probabilities: str) -> str:
        """Step 7."""
        if self.cached:
            value = self._from_cache(f, self.node.output[2], "value")
        else:
            value = self._heads(f, "value", None)
        context = steps.grouped_product(
            f, probabilities, value, self.heads, self.kv_heads, "output_heads"
        )
        return steps.join_heads(f, context, "output")

    @property
    def shape(self) -> tuple[Dim, ...]:
        """`[B, H, Q, K]`; K is known only at run time."""
        query = self.view.shape(self.named("query"))
        batch, queries = (query[0], query[1]) if query and len(query) == 3 else (None, None)
        return (batch, self.heads, queries, None)

    @property
    def cached(self) -> bool:
        """Whether the node gives back the keys and values that it used."""
        return len(self.node.output) > 2 and all(self.node.output[1:3])

    def named(self, name: str) -> str:
        """The name of an input of the operator; "" where it is absent."""
        return self.input(SLOTS.index(name))

    def total(self, f: Fragment, name: str) -> str:
        """The total sequence length, an int64 vector of one."""
        return steps.as_length(f, self.named("total_sequence_length"), name)

    def wide(self, f: Fragment, value: str, name: str) -> str:
        """A value in float32, in which the kernel computes."""
        if self.elem_type == TensorProto.FLOAT:
            return value
        return f.cast(value, TensorProto.FLOAT, name)

    @cached_property
    def head_size(self) -> int | None:
        """D, where the graph says it."""
        in_query = self.heads if self.named("key") else self.heads + 2 * self.kv_heads
        for name, heads in (("query", in_query), ("key", self.kv_heads), ("past_key", 1)):
            shape = self.view.shape(self.named(name))
            if shape and isinstance(shape[-1], int):
                return shape[-1] // heads
        return None

    def _positions(self, f: Fragment, name: str, count: str, chosen: str | None) -> Queries:
        last, total = self.named("seqlens_k"), self.named("total_sequence_length")
        return Queries(f, name, last, total, count, chosen, self.named("position_ids"))

    def _scores(self, f: Fragment, part: Queries, whole: Queries) -> str:
        """Steps 1 to 3: `[B, H, Q, K]` in float32."""
        query = self._positioned(f, "query", part)
        scale = float_attribute(self.node, "scale", 0.0)
        if scale or self.head_size:
            factor = f.number(scale or 1 / math.sqrt(self.head_size or 1))
            query = f.op("Mul", query, factor, name="query_scaled")
        else:
            size = f.cast(steps.length(f, query, 3, "head_size"), TensorProto.FLOAT, "head_wide")
            query = f.op("Div", query, f.op("Sqrt", size, name="head_root"), name="query_scaled")
        if self.cached:
            key = self.wide(f, self._from_cache(f, self.node.output[1], "key"), "key_wide")
        else:
            key = self._positioned(f, "key", whole)
        turned = f.op("Transpose", key, name="key_turned", perm=[0, 1, 3, 2])
        return steps.grouped_product(f, query, turned, self.heads, self.kv_heads, "scores")

    def _heads(self, f: Fragment, name: str, chosen: str | None) -> str:
        """Query, key or value `[B, heads, L, D]`, sliced out of a packed query."""
        groups, heads = self.kv_heads, self.heads
        packed = not self.named("key")
        value = self.named("query" if packed else name)
        value = steps.take_rows(f, value, chosen, 3, f"{name}_rows")
        starts = {"query": 0, "key": heads, "value": heads + groups}
        own = heads if name == "query" else groups
        if not packed:
            return steps.split_heads(f, value, own, f"{name}_heads")
        apart = steps.reshape_like(f, value, (0, 0, heads + 2 * groups, -1), f"{name}_unpacked")
        part = f.slice(apart, starts[name], starts[name] + own, 2, f"{name}_part")
        return f.op("Transpose", part, name=f"{name}_heads", perm=[0, 2, 1, 3])

    def _positioned(self, f: Fragment, name: str, which: Queries) -> str:
        """Query or new key `[B, heads, L, D]` in float32, normalised and rotated."""
        heads = self.wide(f, self._heads(f, name, which.chosen), f"{name}_wide")
        weight = self.named(f"{name[0]}_norm_weight")
        if weight:
            squares = f.op("Mul", heads, heads, name=f"{name}_squares")
            mean = f.axes_op("ReduceMean", squares, [3], f"{name}_mean_square", keepdims=1)
            epsilon = f.number(float_attribute(self.node, "qk_norm_epsilon", 1e-6))
            mean = f.op("Add", mean, epsilon, name=f"{name}_some_square")
            unit = f.op("Div", heads, f.op("Sqrt", mean, name=f"{name}_rms"), name=f"{name}_unit")
            factor = self.wide(f, weight, f"{name}_norm_weight")
            heads = f.op("Mul", unit, factor, name=f"{name}_normalised")
        if not int_attribute(self.node, "do_rotary", 0):
            return heads
        ids = which.position_ids
        cos, sin = (
            self.wide(
                f,
                f.op("Gather", self.named(cache), ids, name=f"{name}_{cache}", axis=0),
                f"{name}_{cache}_wide",
            )
            for cache in ("cos_cache", "sin_cache")
        )
        table = self.view.shape(self.named("cos_cache"))
        whole = bool(table and self.head_size and table[-1] == self.head_size // 2)
        interleaved = bool(int_attribute(self.node, "rotary_interleaved", 0))
        turned = rotate(
            f, heads, cos, sin, interleaved=interleaved, whole=whole, name=f"{name}_rotary"
        )
        if self.elem_type == TensorProto.FLOAT:
            return turned
        # The kernel rounds what it has rotated.
        return self.wide(f, f.cast(turned, self.elem_type, f"{name}_rounded"), f"{name}_turned")

    def _from_cache(self, f: Fragment, cache: str, name: str) -> str:
        """Step 2, or the same for values: a shared buffer without what is yet to be filled."""
        if not self.named("past_key"):
            return cache
        total = self.total(f, f"{name}_total")
        return steps.first_of(f, cache, total, 2, f"{name}_filled")

    def _visible(self, f: Fragment, part: Queries) -> str:
        """Step 5: whether a query sees a key, bool `[B, 1, Q or 1, K]`."""
        end = part.reach_inside if self.causal else part.lengths
        keys = self.total(f, "keys") if self.cached else part.count
        window = int_attribute(self.node, "local_window_size", -1)
        return visible(f, end, keys, window, "key_visible")

    def _softmax(self, f: Fragment, scores: str, visible: str) -> str:
        """Step 6."""
        sink = self.named("head_sink")
        if sink:
            sink = steps.reshape_like(f, self.wide(f, sink, "sink_wide"), (1, -1, 1, 1), "sink")
            return sink_softmax(f, scores, visible, sink, "softmax")
        if int_attribute(self.node, "smooth_softmax", 0):
            return sink_softmax(f, scores, visible, f.number(0.0), "softmax")
        # Of rows whose keys are all hidden by the bias, ONNX Runtime's tiled kernel makes zeros.
        # The other one, for what that cannot do, computes on.
        asked = len(self.node.output) > 3 and bool(self.node.output[3])
        capped = float_attribute(self.node, "softcap", 0.0) > 0
        tiled = self.cached and self.elem_type == TensorProto.FLOAT and not (asked or capped)
        biased = bool(self.named("attention_bias"))
        return masked_softmax(f, scores, visible, biased=biased, none=tiled, name="softmax")

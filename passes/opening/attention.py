"""ONNX `Attention`, opsets 23 to 25, in plain nodes.

    Y, present_key, present_value, qk_matmul_output = Attention(
        Q [B, H, Q, D] or [B, Q, H*D], K [B, G, L, D] or [B, L, G*D], V [B, G, L, E] or [B, L, G*E],
        attn_mask broadcastable to [B, H, Q, K], past_key [B, G, P, D], past_value [B, G, P, E],
        nonpad_kv_seqlen [B])                                                 with K = P + L

Keys and values of a cache are read from the node's own `present_key` and `present_value` where it
has them, so that the cache is not joined a second time; the new nodes belong behind it.

    1. Q -> [B, H, Q, D] times the scale (all of it on Q: a product of two roots is rounded twice)
    2. K -> [B, G, K, D], the past before it
    3. scores [B, H, Q, K]: the H/G heads of a group as further rows of one product [B, G, H/G*Q, K]
    4. soft-cap
    5. plus the bias of mask, cache and positions, see `attention_masks`
    6. softmax; in the wider type where softmax_precision asks for one (ONNX Runtime's kernels
       never compute it in a narrower type than float32)
    7. probability 0 for queries that see no key
    8. Y: probabilities times V [B, G, K, E], by groups -> [B, H, Q, E] or [B, Q, H*E]
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from onnx import NodeProto, TensorProto, helper

from ..describe import describe_site
from ..fragment import Fragment
from ..graph_view import Dim, GraphView
from ..protos import attribute, int_attribute
from . import steps
from .attention_masks import LOWEST, Masking
from .known import elem_type
from .opening import Closed, Opening, float_attribute, unknown_attributes

_ATTRIBUTES = frozenset(
    "is_causal kv_num_heads q_num_heads qk_matmul_output_mode scale softcap "
    "softmax_precision left_window_size right_window_size".split()
)
_BITS: dict[int, int] = {
    TensorProto.FLOAT16: 16,
    TensorProto.BFLOAT16: 16,
    TensorProto.FLOAT: 32,
    TensorProto.DOUBLE: 64,
}
_ALLOWED: dict[str, frozenset[int]] = {
    "is_causal": frozenset((0, 1)),
    "qk_matmul_output_mode": frozenset((0, 1, 2, 3)),
    "softmax_precision": frozenset(_BITS),
}


@dataclass(frozen=True, eq=False)
class Attention(Opening):
    """An `Attention` node as plain nodes.

    rank: of Q, K, V and Y, 3 or 4.
    kv_heads: number of key and value heads; None where only shapes at run time say it.
    value_type: ONNX element type of V, None where it is unknown.
    masking: what hides keys.
    """

    rank: int
    kv_heads: int | None
    value_type: int | None
    masking: Masking

    def probabilities(self, f: Fragment, rows: int | None = None) -> str:
        """Steps 1 to 7."""
        masking, queries, keys = self.masking, "", ""
        if rows or masking.by_place:
            queries = steps.length(f, self.input(0), self.rank - 2, "queries")
        chosen = steps.spread_rows(f, queries, rows) if rows else None
        key = self._cached(f, 1, "key")
        scores = self._scores(f, self._query(f, chosen), key)
        if (cap := float_attribute(self.node, "softcap", 0.0)) > 0:
            scores = steps.softcap(f, scores, steps.scalar(f, cap, self.elem_type), "capped")
        if masking.counts_keys:
            keys = steps.length(f, key, 2, "keys")
        bias = masking.bias(f, keys, queries, chosen)
        if bias is not None:
            scores = f.op("Add", scores, bias, name="biased")
        attention = self._softmax(f, scores)
        if bias is None or not masking.hides_rows:
            return attention
        highest = f.op("ReduceMax", bias, f.ints(-1), name="highest_bias", keepdims=1)
        lowest = steps.scalar(f, LOWEST[self.elem_type], self.elem_type)
        blind = f.op("LessOrEqual", highest, lowest, name="sees_nothing")
        zero = steps.scalar(f, 0.0, self.elem_type)
        return f.op("Where", blind, zero, attention, name="probabilities")

    def output(self, f: Fragment, probabilities: str) -> str:
        """Step 8."""
        value = self._cached(f, 2, "value")
        if self.value_type not in (None, self.elem_type):
            value = f.cast(value, self.elem_type, "value_cast")
        context = steps.grouped_product(
            f, probabilities, value, self.heads, self.kv_heads, "output_heads"
        )
        return steps.join_heads(f, context, "output") if self.rank == 3 else context

    @property
    def output_rank(self) -> int:
        """That of the inputs."""
        return self.rank

    @property
    def shape(self) -> tuple[Dim, ...]:
        """The shape of the probabilities, as far as the graph says."""
        query = self.view.shape(self.input(0)) or (None,) * self.rank
        key = self.view.shape(self.input(1)) or (None,) * self.rank
        past = (self.view.shape(self.input(4)) or (None,) * 4)[2] if self.input(4) else 0
        new, mask = key[-2], (self.view.shape(self.input(3)) or (None,))[-1]
        keys = new if past == 0 else None
        if isinstance(new, int) and isinstance(past, int):
            keys = new + past
        return (query[0], self.heads, query[-2], mask if keys is None else keys)

    def _query(self, f: Fragment, rows: str | None) -> str:
        """Step 1, of the wanted rows."""
        query = self.input(0)
        if rows:
            query = f.op("Gather", query, rows, name="query_rows_of", axis=self.rank - 2)
        if self.rank == 3:
            query = steps.split_heads(f, query, self.heads, "query")
        return f.op("Mul", query, self._scale(f, query), name="query_scaled")

    def _scale(self, f: Fragment, query: str) -> str:
        if attribute(self.node, "scale") is not None:
            return steps.scalar(f, float_attribute(self.node, "scale", 1.0), self.elem_type)
        size = (self.view.shape(self.input(0)) or (None,))[-1]
        if isinstance(size, int):
            each = size // self.heads if self.rank == 3 else size
            return steps.scalar(f, 1 / math.sqrt(each), self.elem_type)
        wide = max(self.elem_type, TensorProto.FLOAT, key=_BITS.__getitem__)
        number = f.cast(steps.length(f, query, 3, "head_size"), wide, "head_size_float")
        root = f.op("Sqrt", number, name="head_size_root")
        return f.cast(f.op("Reciprocal", root, name="scale_wide"), self.elem_type, "scale")

    def _cached(self, f: Fragment, slot: int, name: str) -> str:
        """K (slot 1) or V (slot 2) with the past: step 2."""
        if slot < len(self.node.output) and self.node.output[slot]:
            return self.node.output[slot]
        new, past = self.input(slot), self.input(slot + 3)
        if self.rank == 3:
            assert self.kv_heads is not None
            new = steps.split_heads(f, new, self.kv_heads, name)
        return f.op("Concat", past, new, name=f"{name}_cached", axis=2) if past else new

    def _scores(self, f: Fragment, query: str, key: str) -> str:
        """Step 3."""
        turned = f.op("Transpose", key, name="key_turned", perm=[0, 1, 3, 2])
        return steps.grouped_product(f, query, turned, self.heads, self.kv_heads, "scores")

    def _softmax(self, f: Fragment, scores: str) -> str:
        """Step 6."""
        wanted = int_attribute(self.node, "softmax_precision", self.elem_type)
        if _BITS[wanted] <= _BITS[self.elem_type]:
            return f.op("Softmax", scores, name="attention", axis=-1)
        wide = f.cast(scores, wanted, "scores_wide")
        attention = f.op("Softmax", wide, name="attention_wide", axis=-1)
        return f.cast(attention, self.elem_type, "attention")


def open_attention(view: GraphView, node: NodeProto) -> Attention | Closed:
    """The opening of an ONNX `Attention` node, or why there is none."""
    closed = unknown_attributes(node, _ATTRIBUTES) or _unknown_values(node) or _unpaired(node)
    if closed is not None:
        return closed
    query, key, value = node.input[:3]
    mask = node.input[3] if len(node.input) > 3 else ""
    kind = next((t for name in _same_type(node) if (t := elem_type(view, name)) in _BITS), None)
    mask_type = elem_type(view, mask) if mask else None
    if kind is None or (mask and mask_type is None):
        silent = query if kind is None else mask
        return Closed(f"reads '{silent}', whose element type the graph does not say", _INFER)
    rank = _rank(view, node)
    facts = describe_site(view, "", 4, helper.make_node("MatMul", [query, key], [""]), mask)
    heads = int_attribute(node, "q_num_heads", 0) or _heads(view, query, rank) or facts.heads
    kv_heads = int_attribute(node, "kv_num_heads", 0) or _heads(view, key, rank)
    if not heads or (rank == 3 and not kv_heads):
        silent = key if heads else query
        return Closed(f"reads '{silent}', whose number of heads the graph does not say", _INFER)
    if kv_heads and heads % kv_heads:
        return Closed(
            f"has {heads} query heads, which {kv_heads} key heads cannot share evenly",
            "set q_num_heads to a multiple of kv_num_heads",
        )
    masking = _masking(view, node, mask_type, kind)
    return Attention(
        node=node,
        view=view,
        elem_type=kind,
        heads=heads,
        causal=masking.causal or masking.right == 0 or facts.causal,
        cross=facts.cross,
        rank=rank,
        kv_heads=kv_heads,
        value_type=elem_type(view, value),
        masking=masking,
    )


_INFER = "run onnx.shape_inference.infer_shapes_path on the model and patch the result"


def _unknown_values(node: NodeProto) -> Closed | None:
    """A refusal for an attribute value that the operator's definition does not have."""
    for name, allowed in _ALLOWED.items():
        if attribute(node, name) is not None and int_attribute(node, name, 0) not in allowed:
            value = int_attribute(node, name, 0)
            return Closed(
                f"has {name}={value}, which the definition of the operator does not know",
                f"set {name} to one of {', '.join(map(str, sorted(allowed)))}",
            )
    for name in ("left_window_size", "right_window_size"):
        if (size := int_attribute(node, name, -1)) < -1:
            return Closed(f"has {name}={size}", f"set {name} to -1 (no limit) or at least 0")
    scale = float_attribute(node, "scale", 1.0)
    if not 0 < scale < math.inf:
        return Closed(f"has scale={scale:g}, of which it takes the root", "set scale above 0")
    return None


def _unpaired(node: NodeProto) -> Closed | None:
    """A refusal for a cache that the operator's definition does not have."""
    _, _, past_key, past_value, nonpad = (*node.input[2:7], "", "", "", "", "")[:5]
    if bool(past_key) != bool(past_value):
        return Closed("has only one of past_key and past_value", "export the model with both")
    if past_key and nonpad:
        return Closed(
            "has both past_key and nonpad_kv_seqlen, of which its definition allows one",
            "export the model with a cache of one kind",
        )
    return None


def _rank(view: GraphView, node: NodeProto) -> int:
    """Of Q, K, V and Y; inputs of rank 3 cannot do without the numbers of heads."""
    for name in (*node.input[:3], node.output[0]):
        if (found := view.rank(name)) is not None:
            return found
    return 3 if attribute(node, "q_num_heads") is not None else 4


def _heads(view: GraphView, value: str, rank: int) -> int | None:
    """The heads of a value of rank 4, None where they are unknown."""
    dim = (view.shape(value) or (None,) * 4)[1] if rank == 4 else None
    return dim if isinstance(dim, int) else None


def _same_type(node: NodeProto) -> list[str]:
    """Values that have the type of Q."""
    past = list(node.input[4:5])
    return [name for name in (*node.input[:2], *past, node.output[0]) if name]


def _masking(view: GraphView, node: NodeProto, mask_type: int | None, kind: int) -> Masking:
    _, _, _, mask, past, _, nonpad = (*node.input, "", "", "", "")[:7]
    length = (view.shape(mask) or (None,))[-1] if mask else None
    new = (view.shape(node.input[1]) or (None, None))[-2]
    old = (view.shape(past) or (None,) * 4)[2] if past else 0
    keys = new + old if isinstance(new, int) and isinstance(old, int) else None
    return Masking(
        mask=mask,
        mask_rank=view.rank(mask) if mask else None,
        mask_type=mask_type,
        mask_short=view.opset >= 24 and (keys is None or length != keys),
        past=past,
        nonpad=nonpad,
        causal=int_attribute(node, "is_causal", 0) == 1,
        left=int_attribute(node, "left_window_size", -1),
        right=int_attribute(node, "right_window_size", -1),
        elem_type=kind,
    )

"""What the com.microsoft attention operators have in common, in plain nodes.

    1. query [B, H, Q, D], times the scale
    2. key [B, H, K, D]
    3. scores [B, H, Q, K], the product of the two
    4. plus attention_bias [B|1, H|1, Q, K], plus mask_filter_value where padding hides a key, plus
       the lowest float32 instead where `unidirectional` does
    5. softmax: the probabilities [B, H, Q, K]
    6. probabilities times value [B, H, K, V], as [B, Q, H*V]

Masks are added rather than applied, as the kernels do it: a row whose keys are all padding is then
what the kernel makes of it. A bias of -inf counts as the lowest float32, so that a row that it
hides altogether is uniform (the kernels give NaN).

Everything up to the softmax is computed in float32, as the CPU kernels do it. Only where rows are
sampled, for a detector, are projections in the operator's type, as in the CUDA kernels: a matrix
product in float32 would cost a graphics card more than the attention.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from onnx import NodeProto, TensorProto, helper

from ..describe import SiteFacts, describe_site
from ..fragment import Fragment
from ..graph_view import GraphView
from ..protos import int_attribute
from . import steps
from .known import elem_type
from .opening import Closed, Opening, float_attribute, unknown_attributes

LOWEST = float(np.finfo(np.float32).min)
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
_SWITCHES = frozenset({"unidirectional", "do_rotary", "past_present_share_buffer", "output_qk"})
_LEAST_OPSET = 10
"""Slice takes bounds that are computed."""
_INFER = "run onnx.shape_inference.infer_shapes_path on the model and patch the result"


@dataclass(frozen=True, eq=False)
class ScaledDot(Opening):
    """An attention operator of com.microsoft; subclasses say where Q, K, V and masks come from."""

    @abstractmethod
    def query(self, f: Fragment, rows: str | None) -> str:
        """The query `[B, H, Q, D]` in float32, or only some of its rows."""

    @abstractmethod
    def key(self, f: Fragment, exact: bool) -> str:
        """The key `[B, H, K, D]` in float32, with what a cache adds.

        exact: not rounded to the operator's type on the way, where that costs something.
        """

    @abstractmethod
    def value(self, f: Fragment) -> str:
        """The value `[B, H, K, V]`, in the operator's type; its nodes' names begin with `value`."""

    @abstractmethod
    def padding(self, f: Fragment, keys: str, rows: str | None) -> str | None:
        """Where padding hides a key, bool, broadcastable to `[B, 1, Q, K]`.

        keys: their number, an int64 vector of one.
        """

    @abstractmethod
    def bias(self, f: Fragment) -> str:
        """What is added to the scores, `[B|1, H|1, Q, K]`; "" for nothing."""

    @property
    def head_size(self) -> int | None:
        """D, where the graph says it."""
        return None

    def queries(self, f: Fragment) -> str:
        """The number of query rows, an int64 vector of one."""
        return steps.length(f, self.input(0), 1, "queries")

    def new_keys(self, _: Fragment, queries: str) -> str:
        """How many keys are not from a cache; as many as queries in self attention."""
        return queries

    def probabilities(self, f: Fragment, rows: int | None = None) -> str:
        """Steps 1 to 5."""
        queries = self.queries(f)
        chosen = steps.spread_rows(f, queries, rows) if rows else None
        query = self._scaled(f, self.query(f, chosen))
        key = self.key(f, exact=chosen is None)
        scores = steps.product_of_heads(f, query, key, "scores")
        added = self._added(f, key, queries, chosen)
        if added is not None:
            scores = f.op("Add", scores, added, name="scores_masked")
        found = f.op("Softmax", scores, name="softmax", axis=3)
        return self.narrow(f, found, "probabilities")

    def output(self, f: Fragment, probabilities: str) -> str:
        """Step 6."""
        context = f.op("MatMul", probabilities, self.value(f), name="output_heads")
        return steps.join_heads(f, context, "output")

    def wide(self, f: Fragment, value: str, name: str) -> str:
        """A value of the operator's type in float32."""
        if self.elem_type == TensorProto.FLOAT:
            return value
        return f.cast(value, TensorProto.FLOAT, name)

    def narrow(self, f: Fragment, value: str, name: str) -> str:
        """A float32 value in the operator's type."""
        if self.elem_type == TensorProto.FLOAT:
            return value
        return f.cast(value, self.elem_type, name)

    def present(self, slot: int) -> str:
        """The name of a further output; "" where it is absent."""
        return self.node.output[slot] if slot < len(self.node.output) else ""

    @property
    def hidden_score(self) -> float:
        """What padding adds to a score."""
        return max(float_attribute(self.node, "mask_filter_value", -10000.0), LOWEST)

    def _scaled(self, f: Fragment, query: str) -> str:
        scale, size = float_attribute(self.node, "scale", 0.0), self.head_size
        if scale or size:
            factor = f.number(scale or 1 / math.sqrt(size or 1))
            return f.op("Mul", query, factor, name="query_scaled")
        width = f.cast(steps.length(f, query, 3, "head_size"), TensorProto.FLOAT, "head_wide")
        return f.op("Div", query, f.op("Sqrt", width, name="head_root"), name="query_scaled")

    def _added(self, f: Fragment, key: str, queries: str, rows: str | None) -> str | None:
        """Step 4: what is added to the scores, in float32."""
        keys = steps.length(f, key, 2, "keys")
        lowest = f.number(LOWEST)
        mask = None
        padding = self.padding(f, keys, rows)
        if padding is not None:
            hidden = f.number(self.hidden_score)
            mask = f.op("Where", padding, hidden, f.number(0.0), name="padding_added")
        if int_attribute(self.node, "unidirectional", 0):
            later = self._later(f, queries, keys, rows)
            mask = f.op("Where", later, lowest, mask or f.number(0.0), name="causal_added")
        bias = self.bias(f)
        if not bias:
            return mask
        some = steps.take_rows(f, bias, rows, 4, "bias_rows")
        bias = f.op("Max", self.wide(f, some, "bias_wide"), lowest, name="bias_finite")
        if mask is None:
            return bias
        both = f.op("Add", bias, mask, name="bias_masked")
        if self.hidden_score > LOWEST / 4:
            return both
        return f.op("Max", both, lowest, name="added_finite")

    def _later(self, f: Fragment, queries: str, keys: str, rows: str | None) -> str:
        """Whether causality hides a key, bool `[Q, K]`: row i sees those up to cached + i.

        The last row sees all keys, also where there are more of them than queries.
        """
        row = rows or steps.positions(f, queries, "row")
        cached = f.op("Sub", keys, self.new_keys(f, queries), name="cached_keys")
        limit = f.op("Add", row, cached, name="last_visible")
        last = f.op("Sub", queries, f.ints(1), name="final_row")
        before = f.op("Less", row, last, name="before_final_row")
        limit = f.op("Where", before, limit, keys, name="visible_until")
        limit = f.axes_op("Unsqueeze", limit, [1], "visible_until_column")
        return f.op("Less", limit, steps.positions(f, keys, "key_position"), name="later")


def checked(
    view: GraphView, node: NodeProto, attributes: frozenset[str], needed: Sequence[str]
) -> Closed | int:
    """The operator's float type, read off its inputs, or why it cannot be opened.

    needed: names of the first inputs, which it must have.
    """
    unknown = unknown_attributes(node, attributes)
    if unknown is not None:
        return unknown
    if int_attribute(node, "num_heads", 0) < 1:
        return broken("has no 'num_heads'")
    for name in _SWITCHES & attributes:
        if int_attribute(node, name, 0) not in (0, 1):
            return Closed(
                f"has the value {int_attribute(node, name, 0)} for '{name}', where only 0 and 1 "
                "are known",
                "export the model again with one of them",
            )
    for slot, name in enumerate(needed):
        if slot >= len(node.input) or not node.input[slot]:
            return broken(f"lacks its input '{name}'")
    if view.opset < _LEAST_OPSET:
        return Closed(
            f"is in a model of opset {view.opset}, which cannot express it in plain nodes",
            f"convert the model to opset {_LEAST_OPSET} or later",
        )
    found = float_type(view, [name for name in node.input if name])
    if found is None:
        return Closed("has inputs whose element type is not known", _INFER)
    return found


def read_off(view: GraphView, node: NodeProto, query: str, key: str, masks: str) -> SiteFacts:
    """Whether later keys are hidden, by the node or by what `masks` names, and whether query and
    key are from different sequences.
    """
    scores = helper.make_node("MatMul", [query, key], [""])
    found = [describe_site(view, "", 4, scores, mask) for mask in masks.split() or [""]]
    causal = bool(int_attribute(node, "unidirectional", 0)) or any(f.causal for f in found)
    return replace(found[0], causal=causal)


def float_type(view: GraphView, values: Iterable[str]) -> int | None:
    """The float type of one of the values; failing that, of the weights where all have one."""
    for name in values:
        found = elem_type(view, name)
        if found in _FLOATS:
            return found
    weights = {t.data_type for t in view.initializers.values() if t.data_type in _FLOATS}
    return weights.pop() if len(weights) == 1 else None


def unknown_rank(what: str) -> Closed:
    """A refusal for a value whose rank decides what it means."""
    return Closed(f"has {what} of a rank that cannot be inferred", _INFER)


def broken(reason: str) -> Closed:
    """A refusal for a node that nobody runs."""
    return Closed(reason, "repair the node: ONNX Runtime does not run it either")

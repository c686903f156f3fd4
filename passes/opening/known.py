"""The element type of a value where shape inference is silent: in functions, and behind operators
that it does not know."""

from __future__ import annotations

from onnx import NodeProto, TensorProto

from ..graph_view import GraphView
from ..protos import int_attribute

_FIXED = {
    **dict.fromkeys(
        "And Or Xor Not Equal Less LessOrEqual Greater GreaterOrEqual IsNaN IsInf".split(),
        TensorProto.BOOL,
    ),
    **dict.fromkeys("Shape Size NonZero ArgMax ArgMin".split(), TensorProto.INT64),
}
_TYPED_BY = {"Where": 1, "CastLike": 1, "DequantizeLinear": 1}
"""Operators whose output has not the type of their first input, with the input that it has."""

_TYPED_ELSEWHERE = frozenset(
    "If Loop Scan QuantizeLinear DynamicQuantizeLinear MatMulInteger ConvInteger OneHot "
    "SequenceAt Optional OptionalGetElement".split()
)


def elem_type(view: GraphView, value: str, depth: int = 64) -> int | None:
    """The ONNX element type of `value`, read off what it is computed from; None if unknown."""
    if (known := view.types.get(value)) is not None:
        return known.elem_type
    node = view.producer(value)
    if node is None:
        return None if view.outer is None else elem_type(view.outer, value, depth)
    if node.op_type in _FIXED:
        return _FIXED[node.op_type]
    if node.op_type == "Cast":
        return int_attribute(node, "to", TensorProto.UNDEFINED)
    if node.op_type in ("Constant", "ConstantOfShape"):
        return _type_of_constant(node)
    slot = _TYPED_BY.get(node.op_type, 0)
    if node.op_type in _TYPED_ELSEWHERE or slot >= len(node.input) or not depth:
        return None
    return elem_type(view, node.input[slot], depth - 1)


def _type_of_constant(node: NodeProto) -> int:
    for held in node.attribute:
        if held.name == "value":
            return held.t.data_type
        if held.name in ("value_int", "value_ints"):
            return TensorProto.INT64
    return TensorProto.FLOAT

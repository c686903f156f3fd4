"""com.microsoft `QAttention` in plain nodes.

    output, present = QAttention(
        input [B, Q, E] uint8 or int8, weight [E, 3*H*D] uint8 or int8, bias [3*H*D],
        input_scale, weight_scale [] or [3*H*D], mask_index, input_zero_point,
        weight_zero_point [] or [3*H*D], past [2, B, H, P, D])

Step 1 of `contrib_attention` is MatMulInteger of the input and a slice of the weight, times both
scales, plus a slice of the bias; exact up to the rounding of float32. The rest is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnx import NodeProto, TensorProto

from ..fragment import Fragment
from ..graph_view import GraphView
from ..protos import int_attribute
from . import steps
from .contrib_attention import ATTRIBUTES, Attention, restrictions
from .opening import Closed
from .scaled_dot import checked


@dataclass(frozen=True, eq=False)
class QAttention(Attention):
    """A `QAttention` node as plain nodes."""

    slots: ClassVar[tuple[str, ...]] = tuple(
        "input weights bias input_scale weight_scale mask_index input_zero_point "
        "weight_zero_point past".split()
    )

    def flat(self, f: Fragment, rows: str, side: int, exact: bool, name: str) -> str:
        """Integer product, scaled, plus the bias."""
        weights = self.part(f, "weights", side, 1, f"{name}_weights")
        zero = self.named("input_zero_point")
        weight_zero = self._per_column(f, "weight_zero_point", side, f"{name}_zero")
        operands = [rows, weights]
        if zero or weight_zero:
            zero = zero and steps.reshape_like(f, zero, (), f"{name}_input_zero")
            operands += [zero, weight_zero] if weight_zero else [zero]
        product = f.op("MatMulInteger", *operands, name=f"{name}_integers")
        weight_scale = self._per_column(f, "weight_scale", side, f"{name}_weight_scale")
        scale = f.op(
            "Mul",
            self.wide(f, self.named("input_scale"), f"{name}_input_scale"),
            self.wide(f, weight_scale, f"{name}_weight_scale_wide"),
            name=f"{name}_scale",
        )
        real = f.cast(product, TensorProto.FLOAT, f"{name}_real")
        scaled = f.op("Mul", real, scale, name=f"{name}_scaled")
        bias = self.part(f, "bias", side, 0, f"{name}_bias")
        bias = self.wide(f, bias, f"{name}_bias_wide")
        found = f.op("Add", scaled, bias, name=f"{name}_biased")
        return found if exact else self.narrow(f, found, name)

    def _per_column(self, f: Fragment, what: str, side: int, name: str) -> str:
        """A scalar, or this side's part of what each column has."""
        value = self.named(what)
        if not value:
            return ""
        shape = self.dims(value)
        if shape is not None and (not shape or shape[0] == 1):
            return steps.reshape_like(f, value, (), f"{name}_scalar")
        return self.part(f, what, side, 0, name)


def open_quantized_attention(view: GraphView, node: NodeProto) -> QAttention | Closed:
    """The opening of a `QAttention` node."""
    elem_type = checked(view, node, ATTRIBUTES, QAttention.slots[:5])
    if isinstance(elem_type, Closed):
        return elem_type
    found = restrictions(view, node, QAttention.slots)
    if isinstance(found, Closed):
        return found
    return QAttention(
        node,
        view,
        elem_type,
        heads=int_attribute(node, "num_heads", 0),
        causal=bool(int_attribute(node, "unidirectional", 0)),
        cross=False,
        mask_rank=found,
    )

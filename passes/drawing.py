"""Draw nodes and declare values of which only types and shapes count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
from onnx import GraphProto, NodeProto, TensorProto, helper

Dims = Sequence[int | None]


class Drawing:
    """A graph that stand-ins are drawn into. Values are their names.

    tensors: the initializers in sight; only their types and dimensions count.
    """

    def __init__(self, graph: GraphProto, tensors: dict[str, TensorProto], opset: int) -> None:
        self.graph, self.tensors, self.opset = graph, tensors, opset
        self._count = 0

    def op(self, op: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Add a node; returns its output, which is `output` or a new value."""
        output = output or self.name()
        self.graph.node.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def standard(self, op: str, node: NodeProto, *inputs: str, output: str = "") -> str:
        """The operator `op` with those attributes of `node` that it has too."""
        output = self.op(op, *inputs, output=output)
        known = onnx.defs.get_schema(op, self.opset, "").attributes
        self.graph.node[-1].attribute.extend(a for a in node.attribute if a.name in known)
        return output

    def declare(self, dims: Dims, elem_type: int = TensorProto.FLOAT, name: str = "") -> str:
        """A value of that type and shape that nothing makes; None: a dimension of its own."""
        name = name or self.name()
        self.graph.value_info.append(helper.make_tensor_value_info(name, elem_type, list(dims)))
        return name

    def shaped(self, like: str, dims: Dims, output: str = "") -> str:
        """A value of the type of `like` and of shape `dims`."""
        one = self.op("ReduceMax", like, keepdims=0)
        return self.op("Where", self.declare(dims, TensorProto.BOOL), one, one, output=output)

    def resized(self, value: str, size: int | None, output: str = "") -> str:
        """`value` with a last dimension of `size`; None: of its own."""
        return self.op("MatMul", value, self.declare((None, size)), output=output)

    def dims(self, value: str) -> Dims:
        """The dimensions of an initializer; none where it is not one."""
        return tuple(self.tensors[value].dims) if value in self.tensors else ()

    def elem_type(self, value: str, default: int = TensorProto.FLOAT) -> int:
        """The element type of an initializer."""
        return self.tensors[value].data_type if value in self.tensors else default

    def name(self) -> str:
        """A name for a new value."""
        self._count += 1
        return f"atpatch/stand-in/{id(self)}/{self._count}"

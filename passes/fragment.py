"""Author small pieces of graph with onnx-graphsurgeon, at the operator versions of the host.

A fragment is never a host: graphsurgeon writes new nodes well and rewrites old models badly, so
fragments leave here as edits and hosts never enter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto

from ..edits import RECORD_KEY, AddInitializer, AddNode, Edit

_AXES_AS_INPUT = {
    "ReduceSum": 13,
    "Squeeze": 13,
    "Unsqueeze": 13,
    "ReduceMean": 18,
    "ReduceMax": 18,
    "ReduceMin": 18,
}
"""Since which opset an operator takes its axes as an input."""


class Constants:
    """Tensors that fragments share: equal ones are stored once, and subgraphs capture them."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.tensors: dict[str, TensorProto] = {}
        self.values: dict[str, gs.Variable] = {}

    def add(self, name: str, value: NDArray[np.generic]) -> str:
        """Store `value` under `<prefix>/<name>`; returns the full name."""
        full = f"{self.prefix}/{name}"
        tensor = onnx.numpy_helper.from_array(value, full)
        assert self.tensors.setdefault(full, tensor) == tensor, f"two tensors are called {full}"
        return full

    def value(self, name: str) -> gs.Variable:
        """The one graphsurgeon variable of that name."""
        return self.values.setdefault(name, gs.Variable(name))

    def edits(self) -> Iterator[Edit]:
        """The tensors as edits."""
        return (AddInitializer(tensor) for tensor in self.tensors.values())


def shared_prefix(model: ModelProto) -> str:
    """Before the names of what sites share; a further patch on a model has names of its own."""
    earlier = sum(p.key.startswith(RECORD_KEY) for p in model.metadata_props)
    return f"atpatch/shared{earlier + 1 if earlier else ''}"


def as_stored(edits: Iterable[Edit], ir_version: int) -> tuple[Edit, ...]:
    """The edits as a host of that IR version takes them.

    Before version 4 every initializer must be an input of the graph too; there, tensors are added
    as Constant nodes.
    """
    edits = tuple(edits)
    if ir_version >= 4:
        return edits
    return tuple(_constant(e.tensor) if isinstance(e, AddInitializer) else e for e in edits)


def _constant(tensor: TensorProto) -> AddNode:
    name = tensor.name
    return AddNode(0, onnx.helper.make_node("Constant", [], [name], name, value=tensor))


class Fragment:
    """Nodes under construction; every value and node is called `<prefix>/<name>`.

    Values are their names, so that those of the host, of a detector and of enclosing fragments
    are used alike.
    """

    def __init__(self, prefix: str, opset: int, constants: Constants) -> None:
        self.prefix, self.opset, self.constants = prefix, opset, constants
        self._graph = gs.Graph(opset=opset, name=prefix)

    def op(self, op: str, *inputs: str, name: str, **attributes: object) -> str:
        """Add a node and return its output, which is called `<prefix>/<name>`."""
        full = f"{self.prefix}/{name}"
        value = self.constants.value
        read, made = [value(i) for i in inputs], [value(full)]
        self._graph.nodes.append(gs.Node(op, full, attributes, inputs=read, outputs=made))
        return full

    def ints(self, *values: int) -> str:
        """An int64 vector."""
        return self.constants.add("i" + "_".join(map(str, values)), np.array(values, np.int64))

    def number(self, value: float, dtype: type[np.floating] = np.float32) -> str:
        """A float scalar."""
        return self.constants.add(f"{np.dtype(dtype).name}({value!r})", np.array(value, dtype))

    def axes_op(
        self, op: str, value: str, axes: Sequence[int], name: str, **attributes: object
    ) -> str:
        """A Reduce*, Squeeze or Unsqueeze over `axes` (not negative: opset 9 has no such)."""
        if self.opset >= _AXES_AS_INPUT[op]:
            return self.op(op, value, self.ints(*axes), name=name, **attributes)
        return self.op(op, value, name=name, axes=list(axes), **attributes)

    def slice(self, value: str, start: int, end: int, axis: int, name: str) -> str:
        """`value[start:end]` along `axis`."""
        if self.opset < 10:
            return self.op("Slice", value, name=name, starts=[start], ends=[end], axes=[axis])
        bounds = (self.ints(start), self.ints(end), self.ints(axis))
        return self.op("Slice", value, *bounds, name=name)

    def cast(self, value: str, elem_type: int, name: str) -> str:
        """`value` as another element type."""
        return self.op("Cast", value, name=name, to=elem_type)

    def within(self, name: str) -> Fragment:
        """This fragment, with a longer prefix."""
        inner = Fragment(f"{self.prefix}/{name}", self.opset, self.constants)
        inner._graph = self._graph
        return inner

    def branch(self, name: str) -> Fragment:
        """A fragment for a branch of an `If`; it sees the values of this one."""
        return Fragment(f"{self.prefix}/{name}", self.opset, self.constants)

    def subgraph(self, output: str, elem_type: int) -> gs.Graph:
        """This fragment as a graph attribute with one output, of a shape for the host to infer.

        A declared shape would tell the runtime more than the original does, which then fuses what
        it leaves alone in the original, and computes other bits.
        """
        value = self.constants.value(output)
        value.dtype = elem_type
        self._graph.outputs = [value]
        return self._graph

    def nodes(self) -> list[NodeProto]:
        """The nodes, in order."""
        return list(gs.export_onnx(self._graph, do_type_check=False).graph.node)

"""Shape inference that sees past the operators ONNX knows nothing of.

ONNX infers no shape behind an operator of com.microsoft, or behind one that only ONNX Runtime has
in ONNX's own domain. On a copy of the model each such node gives way to standard ones, a stand-in,
whose outputs have the same types and shapes (`stand_ins`); what they compute is of no interest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from ..edits import Scope
from .drawing import Drawing
from .protos import read_within
from .stand_ins import STAND_INS, is_opaque

_LARGE_BYTES = 4096
"""Tensors above this have no shape in them, and are copied without their data."""


def infer(model: ModelProto) -> dict[Scope, GraphProto]:
    """The main graph and every subgraph of `model` with the value_info that inference adds.

    Nodes that stand-ins replace are missing in them: they are to be read for types only.
    """
    calls = {(f.domain, f.name) for f in model.functions}
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
    copy = inferred = model.graph
    with contextlib.suppress(Exception):  # inference is a help: an odd model must not stop us
        copy = _Copy(model, opset, calls).whole()
        inferred = _infer(copy, model)
    found = dict(_matched(model.graph, inferred, ()))
    plain = dict(_matched(model.graph, copy, ()))
    for path in sorted(found, key=len):
        # ONNX takes values of one name in two branches for the same, and sees no outer constants.
        if path and not plain[path].input:
            with contextlib.suppress(Exception):
                found[path] = _infer(_alone(path, plain, found), model)
    return found


def _alone(
    path: Scope, plain: dict[Scope, GraphProto], found: dict[Scope, GraphProto]
) -> GraphProto:
    """A branch as a graph whose inputs are what it captures."""
    graph = GraphProto()
    graph.CopyFrom(plain[path])
    made = {name for node in graph.node for name in node.output}
    made |= {tensor.name for tensor in graph.initializer}
    read = {name for node in graph.node for name in (*node.input, *read_within(node))} - made
    for end in range(len(path) - 1, -1, -1):
        outer = found[path[:end]]
        tensors = [tensor for tensor in outer.initializer if tensor.name in read]
        graph.initializer.extend(map(_header, tensors))
        read -= {tensor.name for tensor in tensors}
        for value in (*outer.value_info, *outer.input, *outer.output):
            if value.name in read:
                graph.input.append(value)
                read.discard(value.name)
    return graph


def _infer(graph: GraphProto, model: ModelProto) -> GraphProto:
    """`graph` as the main graph of `model`, inferred."""
    whole = ModelProto(ir_version=max(model.ir_version, 4), opset_import=model.opset_import)
    whole.functions.extend(model.functions)
    whole.graph.CopyFrom(graph)
    return onnx.shape_inference.infer_shapes(whole, data_prop=True).graph


def _matched(
    original: GraphProto, inferred: GraphProto, path: Scope
) -> Iterator[tuple[Scope, GraphProto]]:
    """Each inferred graph under the path of its original."""
    yield path, inferred
    ours = [(i, node) for i, node in enumerate(original.node) if _graphs(node)]
    theirs = [node for node in inferred.node if _graphs(node)]
    for (i, node), other in zip(ours, theirs, strict=True):
        pairs = zip(_graphs(node), _graphs(other), strict=True)
        for (j, k, graph), (_, _, its) in pairs:
            yield from _matched(graph, its, (*path, (i, j, k)))


def _graphs(node: NodeProto) -> list[tuple[int, int, GraphProto]]:
    """The graphs of a node, each with the index of its attribute and its own within that."""
    return [
        (j, k, graph)
        for j, held in enumerate(node.attribute)
        for k, graph in enumerate([held.g] if held.HasField("g") else held.graphs)
    ]


class _Copy:
    """A copy of a model's graphs, without large data and with stand-ins."""

    def __init__(self, model: ModelProto, opset: int, calls: set[tuple[str, str]]) -> None:
        self.model, self.opset, self.calls = model, opset, calls

    def whole(self) -> GraphProto:
        """The copy of the main graph; the graph itself where nothing is to be replaced."""
        graph = self.model.graph
        return self.graph(graph, {}) if any(map(self.changes, graph.node)) else graph

    def changes(self, node: NodeProto) -> bool:
        """Whether `node` needs a stand-in or holds graphs."""
        return self.stands_in(node) or bool(_graphs(node))

    def stands_in(self, node: NodeProto) -> bool:
        """Whether `node` is to be replaced."""
        return (
            node.op_type in STAND_INS
            and is_opaque(node, self.opset)
            and (node.domain, node.op_type) not in self.calls
        )

    def graph(self, graph: GraphProto, outer: dict[str, TensorProto]) -> GraphProto:
        """The copy of one graph, within scopes whose initializers are `outer`."""
        copy = GraphProto(name=graph.name, input=graph.input, output=graph.output)
        copy.value_info.extend(graph.value_info)
        copy.initializer.extend(map(_header, graph.initializer))
        scope = {**outer, **{tensor.name: tensor for tensor in graph.initializer}}
        drawing = Drawing(copy, scope, self.opset)
        for node in graph.node:
            if self.stands_in(node):
                with contextlib.suppress(Exception):  # too few inputs: not ours to report
                    STAND_INS[node.op_type](drawing, node)
                continue
            copy.node.append(node)
            for j, k, inner in _graphs(node):
                new = self.graph(inner, scope)
                if node.domain not in ("", "ai.onnx"):  # a decoder: a model of its own
                    new = _infer(new, self.model)
                held = copy.node[-1].attribute[j]
                (held.g if held.HasField("g") else held.graphs[k]).CopyFrom(new)
        return copy


def _header(tensor: TensorProto) -> TensorProto:
    """A tensor by name, type and shape, with its data where that may be a shape itself."""
    if len(tensor.raw_data) <= _LARGE_BYTES and tensor.ByteSize() <= 2 * _LARGE_BYTES:
        return tensor
    return TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)

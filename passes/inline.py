"""Put a detector's nodes into a host, under names that cannot collide."""

from __future__ import annotations

from collections.abc import Mapping

from onnx import GraphProto, NodeProto, TensorProto

from ..patching import subgraphs


def inline(graph: GraphProto, prefix: str, bound: Mapping[str, str]) -> list[NodeProto]:
    """Copies of the nodes of `graph` in which every name is `<prefix>/<name>`.

    bound: for inputs and initializers of the graph, the host's names that they become.
    """
    return [_copy(node, prefix, bound) for node in graph.node]


def shared_initializers(graph: GraphProto, prefix: str) -> dict[str, TensorProto]:
    """Copies of the initializers, by their old names: stored once, read by every instance."""
    copies = {}
    for tensor in graph.initializer:
        copy = TensorProto()
        copy.CopyFrom(tensor)
        copy.name = f"{prefix}/{tensor.name}"
        copies[tensor.name] = copy
    return copies


def _copy(node: NodeProto, prefix: str, bound: Mapping[str, str]) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    _rename(copy, prefix, bound)
    return copy


def _rename(node: NodeProto, prefix: str, bound: Mapping[str, str]) -> None:
    def new(name: str) -> str:
        return name and bound.get(name, f"{prefix}/{name}")

    node.name = f"{prefix}/{node.name or next(filter(None, node.output), node.op_type)}"
    node.input[:] = [new(name) for name in node.input]
    node.output[:] = [new(name) for name in node.output]
    for graph in subgraphs(node):
        # Names are unique over nested graphs (ONNX IR, "Names within a graph"), so that one
        # mapping serves what a subgraph captures and what it makes.
        for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
            value.name = new(value.name)
        for inner in graph.node:
            _rename(inner, prefix, bound)

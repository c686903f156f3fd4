"""Copies of nodes under other names, subgraphs included."""

from __future__ import annotations

from collections.abc import Mapping

from onnx import NodeProto

from .protos import subgraphs


def renamed(node: NodeProto, prefix: str, bound: Mapping[str, str]) -> NodeProto:
    """A copy of `node` whose names are those of `bound`, or get the prefix `<prefix>/`."""
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
        for value in (*graph.input, *graph.output, *graph.value_info):
            value.name = new(value.name)
        for tensor in graph.initializer:
            tensor.name = new(tensor.name)
        for inner in graph.node:
            _rename(inner, prefix, bound)

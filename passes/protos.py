"""Reading nodes: attributes, subgraphs, what they call."""

from __future__ import annotations

from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto


def attribute(node: NodeProto, name: str) -> AttributeProto | None:
    """The attribute `name` of a node."""
    return next((a for a in node.attribute if a.name == name), None)


def int_attribute(node: NodeProto, name: str, default: int) -> int:
    """An integer attribute, or its default."""
    found = attribute(node, name)
    return default if found is None else int(found.i)


def graphs_of(attribute: AttributeProto) -> list[GraphProto]:
    """The graphs that an attribute holds."""
    return [attribute.g] if attribute.HasField("g") else list(attribute.graphs)


def subgraphs(node: NodeProto) -> list[GraphProto]:
    """The graphs in a node's attributes (`If`, `Loop`, `Scan`, generation operators)."""
    return [graph for attribute in node.attribute for graph in graphs_of(attribute)]


def read_within(node: NodeProto) -> set[str]:
    """The names that a node's subgraphs read, their own and captured ones."""
    graphs = subgraphs(node)
    read: set[str] = set()
    for graph in graphs:  # grows by the graphs within
        for inner in graph.node:
            read.update(inner.input)
            graphs += subgraphs(inner)
        read.update(value.name for value in graph.output)
    return read


def called(model: ModelProto, node: NodeProto) -> FunctionProto | None:
    """The function of the model that `node` calls, if it calls one."""
    wanted = (domain(node), node.op_type, node.overload)
    return next((f for f in model.functions if (domain(f), f.name, f.overload) == wanted), None)


def domain(node: NodeProto | FunctionProto) -> str:
    """The operator domain, "" for the default one however it is spelt."""
    return "" if node.domain == "ai.onnx" else node.domain

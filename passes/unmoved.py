"""Nodes of a patch that ONNX Runtime must not move across a host's DequantizeLinear.

Behind a DequantizeLinear, the runtime swaps operators that only move data with it, and quantises
their result: from opset 21 on with the wrong type for int8, so that the session does not load
(QDQ propagation, seen in 1.31). A node in between that keeps values as they are prevents it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from onnx import NodeProto, helper

from ..edits import AddNode, Edit
from .graph_view import GraphView
from .protos import subgraphs

_MOVED = frozenset("Transpose Reshape Squeeze Unsqueeze Slice".split())


def unmoved(view: GraphView, edits: Iterable[Edit]) -> Iterator[Edit]:
    """The edits, with a Max of its own before each added node that would be moved."""
    for edit in edits:
        if isinstance(edit, AddNode):
            for keeper in _keepers(view.at(edit.scope), edit.node):
                yield AddNode(edit.before, keeper, edit.scope)
        yield edit


def _keepers(scope: GraphView, node: NodeProto) -> Iterator[NodeProto]:
    """New nodes that `node`, and those in its branches, read from now on."""
    if node.op_type in _MOVED:
        producer = scope.producer(node.input[0])
        if producer is not None and producer.op_type == "DequantizeLinear":
            name = f"{node.name}/unmoved"
            keeper = helper.make_node("Max", node.input[:1], [name], name)
            node.input[0] = name
            yield keeper
    for graph in subgraphs(node):
        for inner in graph.node:
            yield from _keepers(scope, inner)

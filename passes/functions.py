"""The body of a model-local function as it would stand in place of a call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from onnx import AttributeProto, FunctionProto, NodeProto

from ..edits import Scope, scope_text
from .protos import graphs_of
from .renaming import renamed

CALL = -1
"""Instead of an attribute's index in a scope: the function that the node calls."""

PREFIX = "atpatch/inlined/"
IN_BRANCH = "in"
"""Behind the prefix, before the scope of a call that is not in the main graph."""


def body(function: FunctionProto, call: NodeProto, scope: Scope = ()) -> list[NodeProto]:
    """The nodes of `function` with the arguments of `call`; names within it are prefixed.

    scope: of the call; two branches may have values of one name.
    Source: ONNX IR specification, "Functions".
    """
    branch = scope_text(tuple(step for step in scope if step[1] != CALL)).replace("/", "_")
    made = next(filter(None, call.output), call.name).removeprefix(PREFIX)
    prefix = f"{PREFIX}{IN_BRANCH}{branch}/{made}" if branch else PREFIX + made
    absent = [""] * len(function.input)
    bound = dict(zip(function.input, [*call.input, *absent], strict=False))
    bound |= {f: c for f, c in zip(function.output, call.output, strict=False) if c}
    given = {a.name: a for a in (*function.attribute_proto, *call.attribute)}
    nodes = [renamed(node, prefix, bound) for node in function.node]
    _give(nodes, given)
    return nodes


def _give(nodes: Iterable[NodeProto], given: Mapping[str, AttributeProto]) -> None:
    """Replace references to the function's attributes by their values; absent ones go."""
    for node in nodes:
        kept = []
        for held in node.attribute:
            for graph in graphs_of(held):
                _give(graph.node, given)
            if not held.ref_attr_name:
                kept.append(held)
            elif held.ref_attr_name in given:
                value = AttributeProto()
                value.CopyFrom(given[held.ref_attr_name])
                value.name = held.name
                kept.append(value)
        del node.attribute[:]
        node.attribute.extend(kept)

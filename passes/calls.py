"""Edits in the bodies of model-local functions, where they are called.

A function's body has no weights and no place of its own, so that a site in it is patched where the
function is called: that one call is replaced by the body, with the site's edits in it, and all
other calls stay calls. In a scope, the step `(index, CALL, CALL)` leads into such a body.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from onnx import NodeProto

from ..edits import (
    AddNode,
    AddNodeOutput,
    AddOutput,
    Edit,
    Placed,
    RemoveNode,
    RenameOutput,
    RewireInput,
    Scope,
)
from .functions import CALL
from .graph_view import GraphView
from .protos import graphs_of


def unfold(view: GraphView, edits: Iterable[Edit]) -> Iterator[Edit]:
    """The edits, with those in bodies of called functions as edits that replace the calls.

    view: the graph that the scopes start from.
    """
    inside: dict[tuple[Scope, int], list[Placed]] = defaultdict(list)
    for edit in edits:
        steps = edit.scope if isinstance(edit, Placed) else ()
        depth = next((i for i, step in enumerate(steps) if step[1] == CALL), None)
        if depth is None or not isinstance(edit, Placed):
            yield edit
        else:
            inner = replace(edit, scope=steps[depth + 1 :])
            inside[steps[:depth], steps[depth][0]].append(inner)
    for (scope, index), inner_edits in inside.items():
        body = view.at((*scope, (index, CALL, CALL)))
        yield RemoveNode(index, scope)
        unfolded = [e for e in unfold(body, inner_edits) if isinstance(e, Placed)]
        for node in _edited(body.nodes, unfolded):
            yield AddNode(index, node, scope)


def _edited(nodes: Sequence[NodeProto], edits: Sequence[Placed]) -> list[NodeProto]:
    """Copies of nodes of one graph, with edits applied to them and to their subgraphs."""
    copies = []
    for node in nodes:
        copies.append(NodeProto())
        copies[-1].CopyFrom(node)
    added: dict[int, list[NodeProto]] = defaultdict(list)
    removed: set[int] = set()
    inside: dict[tuple[int, int, int], list[Placed]] = defaultdict(list)
    for edit in edits:
        if edit.scope:
            inside[edit.scope[0]].append(replace(edit, scope=edit.scope[1:]))
            continue
        match edit:
            case AddNode(before, node):
                added[before].append(node)
            case RemoveNode(index):
                removed.add(index)
            case RewireInput(index, slot, _, new):
                copies[index].input[slot] = new
            case RenameOutput(index, slot, _, new):
                copies[index].output[slot] = new
            case AddNodeOutput(index, name):
                copies[index].output.append(name)
            case _:
                raise AssertionError(f"{edit} is none that a body can have")
    for (index, attribute, number), inner in inside.items():
        graph = graphs_of(copies[index].attribute[attribute])[number]
        own = [e for e in inner if isinstance(e, AddOutput) and not e.scope]
        graph.output.extend(e.value for e in own)
        rest = [e for e in inner if e not in own]
        new_nodes = _edited(graph.node, rest)
        del graph.node[:]
        graph.node.extend(new_nodes)
    result: list[NodeProto] = []
    for index, copy in enumerate(copies):
        result += added[index]
        if index not in removed:
            result.append(copy)
    return result + added[len(copies)]

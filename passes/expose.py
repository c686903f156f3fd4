"""Make a value an output of the model, through the control flow around it."""

from __future__ import annotations

import numpy as np
from onnx import ValueInfoProto, helper, numpy_helper

from ..edits import AddNode, AddNodeOutput, AddOutput, Edit, Scope
from .functions import CALL
from .graph_view import GraphView
from .protos import graphs_of


def is_reachable(view: GraphView, path: Scope) -> bool:
    """Whether values of the graph at `path` can become outputs of the model.

    The body of a loop runs many times, and a generation operator gives nothing away; a branch of an
    `If` can have a further output, which is empty where the other branch runs (from opset 11 on:
    before, both must have one shape).
    """
    return all(
        step[1] == CALL
        or (view.opset >= 11 and view.at(path[:depth]).nodes[step[0]].op_type == "If")
        for depth, step in enumerate(path)
    )


def path_of(view: GraphView, name: str) -> Scope | None:
    """The path of the graph with a node that makes the value `name`; None if there is none."""
    places = (view, *(inner for inner in view.nested() if inner.graph is not None))
    return next((place.path for place in places if name in place.producers), None)


def expose(
    view: GraphView, path: Scope, name: str, elem_type: int, rank: int
) -> tuple[list[Edit], str]:
    """Edits that make the value `name` of the graph at `path` an output; and what that is called.

    Its shape is left for the runtime to infer: declared shapes change what it fuses. The graph must
    be reachable.
    """

    def output(value: str) -> ValueInfoProto:
        return helper.make_tensor_value_info(value, elem_type, None)

    nothing = np.zeros([0] * rank, helper.tensor_dtype_to_np_dtype(elem_type))
    edits: list[Edit] = []
    inner = name
    for depth in reversed(range(len(path))):
        index, attribute, _ = path[depth]
        if attribute == CALL:  # the body will stand in place of the call
            continue
        outer = path[:depth]
        edits.append(AddOutput(output(inner), path[: depth + 1]))
        for number, held in enumerate(view.at(outer).nodes[index].attribute):
            if number == attribute or not graphs_of(held):
                continue
            empty = f"{name}/empty{depth}"
            other = (*outer, (index, number, 0))
            end = len(view.at(other).nodes)
            value = numpy_helper.from_array(nothing, empty)
            node = helper.make_node("Constant", [], [empty], empty, value=value)
            edits += [AddNode(end, node, other), AddOutput(output(empty), other)]
        inner = f"{name}/outside{depth}"
        edits.append(AddNodeOutput(index, inner, outer))
    return [*edits, AddOutput(output(inner))], inner

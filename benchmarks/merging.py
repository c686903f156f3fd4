"""One file for the first and all further steps of a decoder, as deployed ones often are."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto, TensorProto, helper

SWITCH = "use_cache_branch"


def merge(first: Path, further: Path) -> ModelProto:
    """An `If` whose branches are the two graphs; a weight that both have is stored once, outside.

    The outputs of both are the same values in the same order; inputs of one name are one input.
    """
    models = [onnx.load(path) for path in (further, first)]
    shared = GraphProto()
    then, other = (_branch(model, shared) for model in models)
    node = helper.make_node(
        "If",
        [SWITCH],
        [value.name for value in models[0].graph.output],
        "decoder",
        then_branch=then,
        else_branch=other,
    )
    switch = helper.make_tensor_value_info(SWITCH, TensorProto.BOOL, [])
    inputs = {value.name: value for model in reversed(models) for value in model.graph.input}
    graph = helper.make_graph(
        [node],
        "merged",
        [switch, *inputs.values()],
        list(models[0].graph.output),
        list(shared.initializer),
    )
    merged = helper.make_model(graph, opset_imports=models[0].opset_import)
    merged.ir_version = models[0].ir_version
    return merged


def _branch(model: ModelProto, shared: GraphProto) -> GraphProto:
    """The graph without inputs; its weights go to `shared`, under a name for each content."""
    graph = model.graph
    there = {(t.data_type, tuple(t.dims), t.raw_data): t.name for t in shared.initializer}
    renamed: dict[str, str] = {}
    for tensor in graph.initializer:
        key = (tensor.data_type, tuple(tensor.dims), tensor.raw_data)
        if not tensor.raw_data or key not in there:
            there[key] = f"shared_{len(shared.initializer)}_{tensor.name}"
            shared.initializer.append(tensor)
            shared.initializer[-1].name = there[key]
        renamed[tensor.name] = there[key]
    nodes = list(graph.node)
    for node in nodes:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    return helper.make_graph(nodes, graph.name, [], list(graph.output))

"""One-node models and their opened forms, for comparing the two in ONNX Runtime.

The node that makes a model's first output is the fused one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from atpatch_onnx.passes.fragment import Constants, Fragment
from atpatch_onnx.passes.graph_view import GraphView
from atpatch_onnx.passes.opening.opening import Closed, Opening
from atpatch_onnx.runtime import Arrays

from hosts import run_model

Open = Callable[[GraphView, NodeProto], Opening | Closed]


def opening_of(model: ModelProto, open_op: Open) -> Opening:
    """The opening of the model's fused node, which must not be closed."""
    view = GraphView.of(model)
    node = view.producer(model.graph.output[0].name)
    assert node is not None
    found = open_op(view, node)
    assert isinstance(found, Opening), f"{found.reason}: {found.fix}"
    return found


def reason_closed(model: ModelProto, open_op: Open) -> str:
    """Why the model's fused node cannot be opened."""
    view = GraphView.of(model)
    node = view.producer(model.graph.output[0].name)
    assert node is not None
    found = open_op(view, node)
    assert isinstance(found, Closed)
    assert found.fix
    return found.reason


def opened_model(model: ModelProto, open_op: Open, rows: int | None = None) -> ModelProto:
    """The model with its first output made by the opened form.

    The fused node is left out where nothing else of it is read. By default probabilities and output
    share a fragment; with `rows` they have one each, and the map of that many rows is the further
    output "sampled".
    """
    opening = opening_of(model, open_op)
    constants = Constants("c")
    fragment = Fragment("opened", opening.view.opset, constants)
    fragments = [fragment]
    probabilities = opening.probabilities(fragment)
    if rows is not None:
        fragment = Fragment("values", opening.view.opset, constants)
        fragments.append(fragment)
    output = opening.output(fragment, probabilities)
    made = _fused_aside(model, opening.node)
    made.graph.node.extend(node for f in fragments for node in f.nodes())
    made.graph.node.append(helper.make_node("Identity", [output], [model.graph.output[0].name]))
    if rows is not None:
        sampled = Fragment("sampled", opening.view.opset, constants)
        _add_map(made, sampled, opening.probabilities(sampled, rows), "sampled", opening.elem_type)
    return _completed(made, constants)


def probabilities_model(model: ModelProto, open_op: Open, rows: int | None = None) -> ModelProto:
    """The model with the opened probabilities as its only output, "probabilities"."""
    opening = opening_of(model, open_op)
    constants = Constants("c")
    fragment = Fragment("opened", opening.view.opset, constants)
    probabilities = opening.probabilities(fragment, rows)
    made = _fused_aside(model, opening.node)
    del made.graph.output[:]
    _add_map(made, fragment, probabilities, "probabilities", opening.elem_type)
    return _completed(made, constants)


def compare(model: ModelProto, opened: ModelProto, feeds: Arrays, atol: float) -> float:
    """Run both and assert that all outputs of `model` are equal; the largest deviation.

    Deviations are absolute below 1 and relative above.
    """
    wanted, found = run_model(model, feeds), run_model(opened, feeds)
    return max(deviation(found[name], wanted[name], atol) for name in wanted)


def deviation(found: NDArray[np.generic], wanted: NDArray[np.generic], atol: float) -> float:
    """Assert that `found` is no NaN, of the type and shape of `wanted`, and within `atol` of it."""
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    assert not np.isnan(a).any()
    assert (np.isfinite(a) | (a == b)).all()
    apart = np.subtract(a, b, out=np.zeros_like(a), where=a != b)
    ratio = apart / np.maximum(np.abs(b), 1.0, where=np.isfinite(b), out=np.ones_like(b))
    worst = float(np.abs(ratio).max(initial=0.0))
    assert worst <= atol, f"{worst:.3g} apart, {atol:g} allowed"
    return worst


def _fused_aside(model: ModelProto, fused: NodeProto) -> ModelProto:
    """A copy whose fused node makes only its further outputs; without it where it has none."""
    made = ModelProto()
    made.CopyFrom(model)
    node = next(n for n in made.graph.node if n.output[0] == fused.output[0])
    if any(node.output[1:]):
        node.output[0] = "fused"
    else:
        made.graph.node.remove(node)
    return made


def _add_map(model: ModelProto, fragment: Fragment, value: str, name: str, elem_type: int) -> None:
    model.graph.node.extend([*fragment.nodes(), helper.make_node("Identity", [value], [name])])
    dims = ["B", "H", f"{name}_rows", "K"]
    model.graph.output.append(helper.make_tensor_value_info(name, elem_type, dims))


def _completed(model: ModelProto, constants: Constants) -> ModelProto:
    tensors: list[TensorProto] = list(constants.tensors.values())
    model.graph.initializer.extend(tensors)
    onnx.checker.check_model(model)
    return model

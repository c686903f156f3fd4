"""Detectors of scope `model` for tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import TensorProto, helper


def column_mean_detector(
    path: Path, observed: Sequence[str], applied: Sequence[str], threshold: float, opset: int = 17
) -> None:
    """Write a detector: the largest column mean over the observed sites."""
    names = [f"attention.{site}" for site in observed]
    nodes = [
        helper.make_node("ReduceMean", [name], [f"m{i}"], axes=[1, 2], keepdims=1)
        for i, name in enumerate(names)
    ]
    nodes.append(helper.make_node("Max", [f"m{i}" for i in range(len(names))], ["anomaly"]))
    info = helper.make_tensor_value_info
    inputs = [info(name, TensorProto.FLOAT, ["B", "H", "Q", "K"]) for name in names]
    output = info("anomaly", TensorProto.FLOAT, ["B", 1, 1, "K"])
    graph = helper.make_graph(nodes, "det", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    about = {"abi": "1", "scope": "model", "threshold": threshold, "apply": json.dumps([*applied])}
    helper.set_model_props(model, {f"atpatch.{key}": str(value) for key, value in about.items()})
    onnx.save(model, path)

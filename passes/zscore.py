"""A detector that needs no training: how far is a column from normal, for this site and position?

Features are whitened with clean statistics and the largest over-attention decides. Whitening is
what separates a trigger from an attention sink, which is normal where it sits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from .features import add_features
from .fragment import Constants, Fragment

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Tables:
    """Clean statistics of S sites, F features, H heads and P positions or buckets.

    center, gain: `[S, F, P]`; a column scores the largest of (feature - center) * gain.
    benign: `[S, H, P]`, mean attention of each column over queries; relative to the uniform share
    1 / (number of visible keys) where positions are buckets.
    heads, keys: `[S]`, what each site really has; tables of smaller sites are padded.
    buckets: whether positions are buckets.
    """

    center: Array
    gain: Array
    benign: Array
    heads: tuple[int, ...]
    keys: tuple[int, ...]
    buckets: bool


def build_zscore(tables: Tables, opset: int, ir_version: int) -> ModelProto:
    """The detector of `tables`: `attention, layer -> anomaly, benign`; IR version 4 or later.

    The score r >= 0 is mapped to r / (1 + r), so that a threshold t on it is t / (1 + t).
    """
    constants = Constants("zscore")
    f = Fragment("zscore", opset, constants)
    found = add_features(f, "attention", tables.buckets)
    center, gain, benign = (
        f.op("Gather", constants.add(name, table), "layer", name=f"site_{name}", axis=0)
        for name, table in (
            ("center", tables.center),
            ("gain", tables.gain),
            ("benign", tables.benign),
        )
    )
    if len(set(tables.heads)) > 1:
        benign = _cut(f, benign, dimension=1, axis=0)
    if tables.buckets:
        center, gain, benign = (
            _by_bucket(f, table, found.bucket) for table in (center, gain, benign)
        )
        count = f.axes_op("Unsqueeze", found.visible_count, [2], "visible_count_heads")
        benign = f.op(
            "Div",
            benign,
            f.op("Max", count, f.number(1.0), name="some_visible"),
            name="benign_share",
        )
    else:
        if len(set(tables.keys)) > 1:
            center, gain, benign = (
                _cut(f, table, dimension=3, axis=1) for table in (center, gain, benign)
            )
        center, gain, benign = (
            f.axes_op("Unsqueeze", table, [0], f"{_name(table)}_batch")
            for table in (center, gain, benign)
        )
    whitened = f.op(
        "Mul", f.op("Sub", found.features, center, name="distance"), gain, name="whitened"
    )
    largest = f.axes_op("ReduceMax", whitened, [1], "largest", keepdims=1)
    score = f.op("Max", largest, f.number(0.0), name="score")
    odds = f.op("Add", score, f.number(1.0), name="score_plus_one")
    share = f.op("Div", score, odds, name="score_share")
    nodes = [
        *f.nodes(),
        _unsqueeze(f, share, 1, "anomaly"),
        _unsqueeze(f, benign, 2, "benign"),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "zscore",
        [
            value("attention", TensorProto.FLOAT, ["B", "H", "Q", "K"]),
            value("layer", TensorProto.INT64, []),
        ],
        [
            value("anomaly", TensorProto.FLOAT, ["B", 1, 1, "K"]),
            value("benign", TensorProto.FLOAT, [None, "H", 1, "K"]),
        ],
        initializer=list(constants.tensors.values()),
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version
    )
    onnx.checker.check_model(model)
    return model


def _unsqueeze(f: Fragment, value: str, axis: int, output: str) -> NodeProto:
    """The node that makes an output, whose name must not carry the fragment's prefix."""
    if f.opset >= 13:
        return helper.make_node("Unsqueeze", [value, f.ints(axis)], [output], name=output)
    return helper.make_node("Unsqueeze", [value], [output], name=output, axes=[axis])


def _by_bucket(f: Fragment, table: str, bucket: str) -> str:
    """The entries `[B, N, K]` of `table` `[N, P]` for the columns' buckets `[B, K]`."""
    picked = f.op("Gather", table, bucket, name=f"{_name(table)}_picked", axis=1)
    return f.op("Transpose", picked, name=f"{_name(table)}_by_column", perm=[1, 0, 2])


def _cut(f: Fragment, table: str, dimension: int, axis: int) -> str:
    """`table` without the padding of sites that are smaller along a dimension of `attention`."""
    shape = f.op("Shape", "attention", name=f"{_name(table)}_shape{axis}")
    size = f.slice(shape, dimension, dimension + 1, 0, f"{_name(table)}_size{axis}")
    # Slice takes a computed bound as an input, which it has from opset 10.
    bounds = (f.ints(0), size, f.ints(axis))
    return f.op("Slice", table, *bounds, name=f"{_name(table)}_cut{axis}")


def _name(value: str) -> str:
    return value.rsplit("/")[-1]

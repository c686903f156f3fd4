"""Detectors that were trained: small nets that give each column one score.

`contrastive` reads whitened column features, `map-cnn` the head mean of the map itself, which is
the shape that the paper describes (AtPatch, arXiv 2601.21695): CNN, then MLP, one score a column.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from .features import add_features
from .fragment import Constants, Fragment
from .tables import Tables, add_benign, add_distances, as_detector, unsqueeze

Array = NDArray[np.float32]

LIMIT = 4.0
"""Whitened features count at most this much: beyond it a net would only extrapolate."""
DOUBLED = math.log(2)
"""Least rise of the log mean share of a column that goes with the highest one of its map."""
WHITENED = 0.4
"""And where positions have a normal of their own, least share of what one clean input in a hundred
reaches."""
NEAR, STEPS = 2, 4
"""And where they have none, as in sentences, whose words often double: how many columns away the
next one that goes with it may be, and how many times it goes on from there."""


@dataclass(frozen=True)
class Dense:
    """One layer on columns, `[B, in, K] -> [B, out, K]`: weight `[out, in]`, bias `[out]`."""

    weight: Array
    bias: Array


@dataclass(frozen=True)
class ColumnNet:
    """Dense layers with ReLU between them, the last to one logit a column.

    sites: `[S, hidden]`, what is added to the first hidden layer at each site.
    largest: what the largest feature of a column adds to its logit, times its value.
    """

    layers: tuple[Dense, ...]
    sites: Array
    largest: float

    def take(self, sites: NDArray[np.int64]) -> ColumnNet:
        """The net of some of the sites."""
        return replace(self, sites=self.sites[sites])


@dataclass(frozen=True)
class Levels:
    """What logits are normal at each site, `[S]`: a logit x counts as (x - middle) * gain."""

    middle: Array
    gain: Array


@dataclass(frozen=True)
class MapCnn:
    """Convolutions `[out, in, 3, 3]` with biases over the map, then dense layers on its columns."""

    convolutions: tuple[tuple[Array, Array], ...]
    layers: tuple[Dense, ...]


def build_contrastive(
    tables: Tables, net: ColumnNet, levels: Levels, opset: int, ir_version: int
) -> ModelProto:
    """The detector `attention, layer -> anomaly, benign` of a net over whitened features.

    A trigger of several tokens works through all of them, while often one alone stands out from
    what clean inputs do. So columns that are over-attended too have the logit of the highest one.
    That one, which the false-positive budget is about, stays what it is.
    """
    f = Fragment("contrastive", opset, Constants("contrastive"))
    found, distance, whitened = add_distances(f, tables)
    low = f.op("Max", whitened, f.number(-LIMIT), name="limited_below")
    value = f.op("Min", low, f.number(LIMIT), name="limited")
    site = f.op("Gather", f.constants.add("sites", net.sites), "layer", name="site_bias", axis=0)
    site = f.axes_op("Unsqueeze", site, [0, 2], "site_bias_column")
    top = f.axes_op("ReduceMax", value, [1], "largest", keepdims=1)
    share = f.op("Mul", top, f.number(net.largest), name="largest_share")
    logit = f.op("Add", _dense(f, value, net.layers, site), share, name="raw_logit")
    mean = tables.features.index("mean")
    doubled = _above(f, distance, mean, DOUBLED, "doubled")
    if tables.buckets:
        logit = _with_near(f, logit, doubled)
    else:
        outlying = _above(f, whitened, mean, WHITENED, "outlying")
        companion = f.op("And", doubled, outlying, name="companion")
        highest = f.axes_op("ReduceMax", logit, [2], "highest_logit", keepdims=1)
        logit = f.op("Where", companion, highest, logit, name="joined_logit")
    outputs = [_anomaly(f, logit, levels), *add_benign(f, tables, found)]
    return as_detector(f, "contrastive", outputs, opset, ir_version)


def build_map_cnn(
    tables: Tables, net: MapCnn, levels: Levels, opset: int, ir_version: int
) -> ModelProto:
    """The detector `attention, layer -> anomaly, benign` of a CNN over the head mean of the map."""
    f = Fragment("map_cnn", opset, Constants("map_cnn"))
    found = add_features(f, "attention", tables.features, tables.buckets)
    mean = f.axes_op("ReduceMean", "attention", [1], "head_mean", keepdims=1)
    count = f.axes_op("Unsqueeze", found.visible_count, [2, 3], "visible_count_map")
    value = f.op("Mul", mean, count, name="relative_map")
    for index, (weight, bias) in enumerate(net.convolutions):
        tensors = (f.constants.add(f"conv{index}_{n}", v) for n, v in (("w", weight), ("b", bias)))
        value = f.op("Conv", value, *tensors, name=f"conv{index}", pads=[1, 1, 1, 1])
        value = f.op("Relu", value, name=f"conv{index}_relu")
    pooled = (
        f.axes_op("ReduceMean", value, [2], "column_average", keepdims=0),
        f.axes_op("ReduceMax", value, [2], "column_largest", keepdims=0),
    )
    value = f.op("Concat", *pooled, name="columns", axis=1)
    logit = _dense(f, value, net.layers)
    outputs = [_anomaly(f, logit, levels), *add_benign(f, tables, found)]
    return as_detector(f, "map_cnn", outputs, opset, ir_version)


def build_columns(columns: NDArray[np.bool_], opset: int, ir_version: int) -> ModelProto:
    """The detector `attention, layer -> anomaly, benign` that always flags the same columns.

    columns: bool `[S, K]`. Its benign attention is zero: what is flagged is pruned.
    """
    f = Fragment("columns", opset, Constants("columns"))
    table = f.constants.add("columns", columns.astype(np.float32))
    row = f.op("Gather", table, "layer", name="site_columns", axis=0)
    found = add_features(f, "attention", ("mean",), buckets=False)
    zeros = f.op("Mul", found.visible_count, f.number(0.0), name="zeros")
    anomaly = f.op("Add", zeros, row, name="anomaly_rows")
    none = f.op("Mul", anomaly, f.number(0.0), name="no_attention")
    outputs = [unsqueeze(f, anomaly, [1, 2], "anomaly"), unsqueeze(f, none, [1, 2], "benign")]
    return as_detector(f, "columns", outputs, opset, ir_version)


def _dense(f: Fragment, value: str, layers: tuple[Dense, ...], first_bias: str = "") -> str:
    """The logits `[B, 1, K]` of columns `[B, F, K]`."""
    for index, layer in enumerate(layers):
        weight = f.constants.add(f"dense{index}_w", layer.weight)
        bias = f.constants.add(f"dense{index}_b", layer.bias[:, None])
        product = f.op("MatMul", weight, value, name=f"dense{index}_product")
        value = f.op("Add", product, bias, name=f"dense{index}")
        if index == 0 and first_bias:
            value = f.op("Add", value, first_bias, name=f"dense{index}_site")
        if index + 1 < len(layers):
            value = f.op("Relu", value, name=f"dense{index}_relu")
    return value


def _above(f: Fragment, value: str, feature: int, least: float, name: str) -> str:
    """Whether a feature of `[B, F, K]` is above `least`, bool `[B, 1, K]`."""
    row = f.slice(value, feature, feature + 1, 1, f"{name}_feature")
    return f.op("Greater", row, f.number(least), name=name)


def _with_near(f: Fragment, logit: str, companion: str) -> str:
    """Logits `[B, 1, K]` of which companions have the highest that is near."""
    for step in range(STEPS):
        size = 2 * NEAR + 1
        around = f.op("MaxPool", logit, name=f"near{step}", kernel_shape=[size], pads=[NEAR, NEAR])
        logit = f.op("Where", companion, around, logit, name=f"joined_logit{step}")
    return logit


def _anomaly(f: Fragment, raw: str, levels: Levels) -> NodeProto:
    """Logits x as (1 + x / (1 + |x|)) / 2: unlike a sigmoid it still tells large ones apart."""
    middle, gain = (
        f.op("Gather", f.constants.add(f"levels_{name}", table), "layer", name=f"level_{name}")
        for name, table in (("middle", levels.middle), ("gain", levels.gain))
    )
    logit = f.op("Mul", f.op("Sub", raw, middle, name="above_middle"), gain, name="logit")
    size = f.op("Add", f.op("Abs", logit, name="logit_size"), f.number(1.0), name="logit_scale")
    signed = f.op("Div", logit, size, name="softsign")
    shifted = f.op("Add", signed, f.number(1.0), name="softsign_plus_one")
    return unsqueeze(f, f.op("Mul", shifted, f.number(0.5), name="share"), [1], "anomaly")

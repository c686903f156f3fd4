"""Clean statistics as tables of a detector: for each site and position, what is normal there.

Whitening with them is what separates a trigger from an attention sink, which is normal where it
sits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from .features import Features, add_features
from .fragment import Fragment

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Tables:
    """Clean statistics of S sites, F features, H heads and P positions or buckets.

    features: their names.
    center, gain: `[S, F, P]`; whitened is (feature - center) * gain.
    benign: `[S, H, P]`, mean attention of each column over queries, or `[S, H, Q, P]`; relative to
    the uniform share 1 / (number of visible keys) where positions are buckets; None: the detector
    leaves it to the redistribution.
    heads, keys: `[S]`, what each site really has; tables of smaller sites are padded.
    buckets: whether positions are buckets.
    """

    features: tuple[str, ...]
    center: Array
    gain: Array
    benign: Array | None
    heads: tuple[int, ...]
    keys: tuple[int, ...]
    buckets: bool

    def take(self, sites: NDArray[np.int64]) -> Tables:
        """The tables of some of the sites."""
        keys = self.keys if self.buckets else tuple(self.keys[i] for i in sites)
        heads = tuple(self.heads[i] for i in sites)
        # What was padded for a larger site would not fit the maps any more.
        end = None if self.buckets else max(keys)
        benign = self.benign
        if benign is not None:
            benign = benign[sites][:, : max(heads), ..., :end]
            benign = benign if benign.ndim == 3 else benign[:, :, :end]
        return replace(
            self,
            center=self.center[sites][..., :end],
            gain=self.gain[sites][..., :end],
            benign=benign,
            heads=heads,
            keys=keys,
        )


def add_whitening(f: Fragment, tables: Tables) -> tuple[Features, str]:
    """Add nodes for the features of the inputs `attention` and `layer`, whitened: `[B, F, K]`."""
    found, _, whitened = add_distances(f, tables)
    return found, whitened


def add_distances(f: Fragment, tables: Tables) -> tuple[Features, str, str]:
    """The same with the distances from the clean mean, before and after whitening: `[B, F, K]`."""
    found = add_features(f, "attention", tables.features, tables.buckets)
    center, gain = _at_site(f, "center", tables.center), _at_site(f, "gain", tables.gain)
    if tables.buckets:
        center, gain = (_by_bucket(f, table, found.bucket) for table in (center, gain))
    else:
        if len(set(tables.keys)) > 1:
            center, gain = (_cut(f, table, dimension=3, axis=1) for table in (center, gain))
        center, gain = (f.axes_op("Unsqueeze", t, [0], f"{_name(t)}_batch") for t in (center, gain))
    distance = f.op("Sub", found.features, center, name="distance")
    return found, distance, f.op("Mul", distance, gain, name="whitened")


def add_benign(f: Fragment, tables: Tables, found: Features) -> list[NodeProto]:
    """The node that makes the output `benign` `[1 or B, H, 1 or Q, K]`, or none."""
    if tables.benign is None:
        return []
    benign = _at_site(f, "benign", tables.benign)
    if len(set(tables.heads)) > 1:
        benign = _cut(f, benign, dimension=1, axis=0)
    if tables.buckets:
        shares = _by_bucket(f, benign, found.bucket)
        count = f.axes_op("Unsqueeze", found.visible_count, [2], "visible_count_heads")
        some = f.op("Max", count, f.number(1.0), name="some_visible")
        return [unsqueeze(f, f.op("Div", shares, some, name="benign_share"), [2], "benign")]
    rows = tables.benign.ndim == 4
    if len(set(tables.keys)) > 1:
        if rows:
            benign = _cut(f, benign, dimension=2, axis=1)
        benign = _cut(f, benign, dimension=3, axis=2 if rows else 1)
    return [unsqueeze(f, benign, [0] if rows else [0, 2], "benign")]


def _at_site(f: Fragment, name: str, table: Array) -> str:
    return f.op("Gather", f.constants.add(name, table), "layer", name=f"site_{name}", axis=0)


def unsqueeze(f: Fragment, value: str, axes: list[int], output: str) -> NodeProto:
    """The node that makes an output, whose name must not carry the fragment's prefix."""
    if f.opset >= 13:
        return helper.make_node("Unsqueeze", [value, f.ints(*axes)], [output], name=output)
    return helper.make_node("Unsqueeze", [value], [output], name=output, axes=axes)


def as_detector(
    f: Fragment, name: str, outputs: list[NodeProto], opset: int, ir_version: int
) -> ModelProto:
    """The detector `attention, layer -> anomaly[, benign]` whose last nodes are `outputs`."""
    value = helper.make_tensor_value_info
    shapes: dict[str, list[str | int | None]] = {
        "anomaly": ["B", 1, 1, "K"],
        "benign": [None, "H", None, "K"],
    }
    made = [node.output[0] for node in outputs]
    graph = helper.make_graph(
        [*f.nodes(), *outputs],
        name,
        [
            value("attention", TensorProto.FLOAT, ["B", "H", "Q", "K"]),
            value("layer", TensorProto.INT64, []),
        ],
        [value(output, TensorProto.FLOAT, shapes[output]) for output in made],
        initializer=list(f.constants.tensors.values()),
    )
    imports = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=ir_version)
    onnx.checker.check_model(model)
    return model


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

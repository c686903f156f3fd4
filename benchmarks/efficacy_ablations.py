"""Columns that are known from outside, and a redistribution that does not rescale.

No detector can know the columns of the trigger, so an oracle is told: a copy of the victim gets a
further input `marks`, which nothing reads, and a detector reads its anomaly from there. Its benign
attention is that of the z-score detector, the clean mean of each column.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from atpatch_onnx.data import samples_from
from atpatch_onnx.diffing import FlagReader
from atpatch_onnx.layout import with_batch_axes
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.passes.locate import locate
from atpatch_onnx.runtime import Arrays, Session

MARKS = "marks"
KEPT_SCALED = "/kept_scaled"
"""How the node ends that rescales what is not flagged (see `passes/redistribute.py`)."""
ONE = "atpatch/no_rescale/one"


def add_marks_input(model: Path, output: Path) -> Path:
    """Write a copy of `model` with the unused input `marks`, float32 `[N, 1, 1, K]`."""
    copy = onnx.load(model)
    batch = copy.graph.input[0].type.tensor_type.shape.dim[0]
    leading = batch.dim_param or batch.dim_value
    shape = [leading, 1, 1, "marks_keys"]
    copy.graph.input.append(helper.make_tensor_value_info(MARKS, TensorProto.FLOAT, shape))
    onnx.save(copy, output)
    return output


def add_marks_anomaly(detector: Path, output: Path) -> Path:
    """Write a copy of `detector` whose anomaly is its further input `marks`."""
    copy = onnx.load(detector)
    graph = copy.graph
    marked = helper.make_node("Identity", [MARKS], ["anomaly"], name="marked")
    nodes = [node for node in graph.node if "anomaly" not in node.output]
    needed = {"benign"}
    kept = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend([*reversed(kept), marked])
    stored = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(stored)
    graph.input.append(helper.make_tensor_value_info(MARKS, TensorProto.FLOAT, ["B", 1, 1, "K"]))
    helper.set_model_props(
        copy,
        {
            **{entry.key: entry.value for entry in copy.metadata_props},
            "atpatch.kind": MARKS,
            "atpatch.threshold": "0.5",
        },
    )
    onnx.save(copy, output)
    return output


def without_rescaling(patched: Path, output: Path) -> int:
    """Write a copy of a model patched with `strategy="select"` that does not rescale.

    Flagged columns get their benign attention; the others keep what they have, so that rows no
    longer sum to 1: the factor of each node `.../kept_scaled` is 1. Returns how many there are.
    """
    copy = onnx.load(patched)
    nodes = [node for node in copy.graph.node if node.name.endswith(KEPT_SCALED)]
    for node in nodes:
        node.input[1] = ONE
    one = onnx.numpy_helper.from_array(np.array(1, np.float32), ONE)
    copy.graph.initializer.append(one)
    onnx.save(copy, output)
    return len(nodes)


def with_marks(arrays: Mapping[str, NDArray[np.generic]], marks: NDArray[np.bool_]) -> Arrays:
    """The data of a model with the input `marks`; marks `[N, K]`."""
    return {**arrays, MARKS: marks[:, None, None, :].astype(np.float32)}


def flagged(patched: Path, arrays: Arrays, provider: str) -> NDArray[np.bool_]:
    """The columns `[N, K]` that a patched model flags at any site.

    Raises: ValueError where sites differ in their number of columns.
    """
    model = ModelFile.open(patched)
    specs = with_batch_axes(Session(patched, provider).inputs, locate(model.skeleton).sites)
    reader = FlagReader(model, provider)
    samples = samples_from(arrays, specs)
    parts = [np.any(reader.columns(part), axis=0) for part in samples.batches(32)]
    return np.concatenate(parts)


def random_columns(
    like: NDArray[np.bool_], visible: NDArray[np.bool_], rng: np.random.Generator
) -> NDArray[np.bool_]:
    """As many columns as `like` has in each sample, drawn from those that are visible; `[N, K]`."""
    order = np.where(visible, rng.random(like.shape), np.inf).argsort(axis=1)
    rank = order.argsort(axis=1)
    return np.asarray(rank < like.sum(axis=1, keepdims=True)) & visible


def keys_of(model: Path, arrays: Mapping[str, NDArray[np.generic]]) -> int:
    """The number of columns of a model's maps: static, or the length of its token sequence."""
    shape = locate(ModelFile.open(model).skeleton).sites[0].facts.shape
    if shape is not None and isinstance(shape[-1], int):
        return shape[-1]
    first = onnx.load(model, load_external_data=False).graph.input[0].name
    return int(arrays[first].shape[1])


def visible_columns(arrays: Mapping[str, NDArray[np.generic]], keys: int) -> NDArray[np.bool_]:
    """Which columns are no padding, `[N, K]`: what an input `attention_mask` says, else all."""
    if "attention_mask" in arrays:
        return arrays["attention_mask"].astype(bool)
    return np.ones((len(arrays["labels"]), keys), bool)

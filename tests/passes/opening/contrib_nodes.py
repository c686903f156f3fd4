"""One node of com.microsoft as a model, and attention in float64 for what has no CPU kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper

from atpatch_onnx.passes.graph_view import GraphView
from atpatch_onnx.passes.opening.opening import Closed, Opening
from atpatch_onnx.runtime import Arrays

from hosts import run_model
from opened import opened_model, opening_of, probabilities_model

Array = NDArray[Any]
Open = Callable[[GraphView, NodeProto], Opening | Closed]
LOWEST = float(np.finfo(np.float32).min)
TOLERANCE: dict[np.dtype[Any], float] = {
    np.dtype(np.float32): 1e-5,
    np.dtype(np.float16): 2e-3,
}

RANKS = {"present": 5, "present_key": 4, "present_value": 4, "qk": 4}


def node_model(
    op: str,
    slots: str,
    values: Mapping[str, Array],
    *,
    outputs: str = "output",
    symbolic: bool = False,
    weights: str = "",
    opset: int = 17,
    rank: int = 3,
    **attributes: Any,
) -> tuple[ModelProto, Arrays]:
    """A model of one node, and its feeds.

    slots: names of the operator's inputs; those that `values` lacks are left out. weights: which
    of them are initializers. symbolic: the graph says only the ranks of the others. outputs: the
    operator's outputs in order, "-" for one that is not asked for; rank: of the first.
    """
    given = [name if name in values else "" for name in slots.split()]
    while given and not given[-1]:
        given.pop()
    made = ["" if name == "-" else name for name in outputs.split()]
    node = helper.make_node(op, given, made, "attention", domain="com.microsoft", **attributes)
    own = weights.split()
    inputs = [
        helper.make_tensor_value_info(
            name,
            helper.np_dtype_to_tensor_dtype(value.dtype),
            [f"{name}{i}" if symbolic else size for i, size in enumerate(value.shape)],
        )
        for name, value in values.items()
        if name not in own
    ]
    kind = next(v.dtype for v in values.values() if v.dtype in TOLERANCE)
    results = [
        helper.make_tensor_value_info(
            name,
            helper.np_dtype_to_tensor_dtype(kind),
            [f"{name}{i}" for i in range(RANKS.get(name, rank))],
        )
        for name in made
        if name
    ]
    tensors = [numpy_helper.from_array(values[name], name) for name in own if name in values]
    graph = helper.make_graph([node], "host", inputs, results, initializer=tensors)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    return model, {name: value for name, value in values.items() if name not in own}


def heads_of(flat: Array, heads: int) -> Array:
    """`[B, L, H*D]` as `[B, H, L, D]`."""
    return flat.reshape(*flat.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def joined(heads: Array) -> Array:
    """`[B, H, L, D]` as `[B, L, H*D]`."""
    turned = heads.transpose(0, 2, 1, 3)
    return turned.reshape(*turned.shape[:2], -1)


def softmax_of(query: Array, key: Array, added: Array | float, scale: float = 0.0) -> Array:
    """The probabilities of `[B, H, L, D]` queries and keys in float64."""
    q, k = query.astype(np.float64), key.astype(np.float64)
    scores = q @ k.transpose(0, 1, 3, 2) * (scale or 1 / np.sqrt(q.shape[-1])) + added
    powers: Array = np.exp(scores - scores.max(-1, keepdims=True))
    shares: Array = powers / powers.sum(-1, keepdims=True)
    return shares


def normal(seed: int, *shape: int, dtype: Any = np.float32) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def assert_rows_are_sampled(model: ModelProto, open_op: Open, feeds: Arrays, rows: int) -> None:
    """The map of `rows` rows has those rows of the whole map; output is not disturbed by it."""
    (whole,) = run_model(probabilities_model(model, open_op), feeds).values()
    found = run_model(opened_model(model, open_op, rows), feeds)
    queries = whole.shape[2]
    chosen = np.arange(rows) * (queries - 1) // max(rows - 1, 1)
    np.testing.assert_allclose(
        found["sampled"].astype(np.float64), whole[:, :, chosen], atol=TOLERANCE[whole.dtype]
    )
    told = opening_of(model, open_op).shape
    assert all(a == b for a, b in zip(told, whole.shape, strict=True) if isinstance(a, int))

"""Small hosts and detectors as ONNX text, and the one-line assertion on what a patch changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
from numpy.typing import NDArray
from onnx import ModelProto

from atpatch_onnx.comparing import Difference, compare
from atpatch_onnx.edits import Edit
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.passes.graph_view import GraphView
from atpatch_onnx.passes.locate import locate
from atpatch_onnx.passes.outcome import PassResult
from atpatch_onnx.passes.splice import Splice
from atpatch_onnx.patching import Patch, Rewritten, apply
from atpatch_onnx.runtime import Arrays, Session

TYPES: dict[str, type[np.floating[Any]]] = {
    "float": np.float32,
    "float16": np.float16,
    "double": np.float64,
}


KEYS = 8
"""Tokens of `over_attending`."""

Floats = dict[str, NDArray[np.float32]]


def over_attending(fixed: bool, opset: int = 17) -> ModelProto:
    """One site over 8 tokens of width 4, `[N, L, 4]`, whose loud tokens are attended to.

    `mask` hides padding.
    """
    length = KEYS if fixed else "L"
    axes = "<axes = [1]> (mask)" if opset < 13 else "(mask, one)"
    axis = 2 if opset < 13 else -1
    return onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : {opset}]>
        host (float[N, {length}, 4] x, float[N, {length}] mask) => (float[N, {length}, 4] y)
        <float[4, 4] w = {{1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}}, int64[1] one = {{1}}>
        {{
            q = MatMul (x, w)
            k = Transpose <perm = [0, 2, 1]> (x)
            s = MatMul (q, k)
            bias = Unsqueeze {axes}
            t = Add (s, bias)
            p = Softmax <axis = {axis}> (t)
            y = MatMul (p, x)
        }}
    """)


def tokens(count: int, seed: int, padded: bool = False) -> Floats:
    """Clean inputs of `over_attending`; a token with a large first entry is a trigger."""
    rng = np.random.default_rng(seed)
    x = 0.7 * rng.standard_normal((count, KEYS, 4), np.float32)
    x[..., 0] += 1  # what all tokens share, and a trigger can appeal to
    mask = np.zeros((count, KEYS), np.float32)
    if padded:
        for row, real in enumerate(rng.integers(4, KEYS + 1, count)):
            mask[row, real:] = -np.inf
    return {"x": x, "mask": mask}


def attention(opset: int = 17, dtype: str = "float", mask: bool = True) -> ModelProto:
    """Two attention sites in a row, `[B, H, L, D]` inputs, with an additive mask `[B, 1, 1, L]`."""
    axis = 3 if opset < 13 else -1
    add = "Add" if mask else "Max"
    return onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : {opset}]>
        host ({dtype}[B, H, L, D] q, {dtype}[B, H, L, D] k, {dtype}[B, H, L, D] v,
              {dtype}[B, 1, 1, L] mask) => ({dtype}[B, H, L, D] y)
        {{
            kt = Transpose <perm = [0, 1, 3, 2]> (k)
            s0 = MatMul (q, kt)
            t0 = {add} (s0, mask)
            p0 = Softmax <axis = {axis}> (t0)
            c0 = MatMul (p0, v)
            s1 = MatMul (c0, kt)
            t1 = {add} (s1, mask)
            p1 = Softmax <axis = {axis}> (t1)
            y = MatMul (p1, v)
        }}
    """)


def random_feeds(dtype: str = "float", batch: int = 3, seed: int = 0, length: int = 6) -> Arrays:
    """Inputs of `attention`: the last two keys of the last sample are masked."""
    rng = np.random.default_rng(seed)
    kind = TYPES[dtype]
    feeds: Arrays = {n: rng.standard_normal((batch, 2, length, 4)).astype(kind) for n in "qkv"}
    mask = np.zeros((batch, 1, 1, length), kind)
    mask[-1, ..., -2:] = np.finfo(kind).min
    feeds["mask"] = mask
    return feeds


def detector(
    body: str, benign: str = "", threshold: float = 0.5, opset: int = 17, **metadata: str
) -> ModelProto:
    """A detector whose nodes are `body`; it must make `anomaly`, and `benign` where it is named."""
    output = f", {benign}" if benign else ""
    model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : {opset}]>
        det (float[B, H, Q, K] attention) => (float[B, 1, 1, K] anomaly{output})
        {{ {body} }}
    """)
    properties = {"atpatch.abi": "1", "atpatch.threshold": str(threshold), **metadata}
    onnx.helper.set_model_props(model, properties)
    return model


COLUMN_MEAN = """
    rows = ReduceMean <axes = [2], keepdims = 1> (attention)
    anomaly = ReduceMean <axes = [1], keepdims = 1> (rows)
"""
"""The anomaly of a column is its mean attention over heads and queries."""

COLUMN_MEAN_18 = """
    two = Constant <value_ints = [2]> ()
    one = Constant <value_ints = [1]> ()
    rows = ReduceMean <keepdims = 1> (attention, two)
    anomaly = ReduceMean <keepdims = 1> (rows, one)
"""
"""The same from opset 18 on, where the axes are an input."""


def save_arrays(path: Path, arrays: Mapping[str, Any]) -> Path:
    np.savez(path, **arrays)
    return path


def model_file(model: ModelProto, path: str | Path = "host.onnx") -> ModelFile:
    return ModelFile.from_bytes(model.SerializeToString(), path)


def edited(file: ModelFile, edits: tuple[Edit, ...]) -> Rewritten:
    return apply(file, Patch(file.sha256, edits))


def spliced(file: ModelFile, splice: Splice) -> tuple[Rewritten, PassResult]:
    """The host with `splice` applied to all its sites."""
    result = splice(GraphView.of(file.skeleton), locate(file.skeleton).sites)
    return edited(file, result.edits), result


def run(model: ModelFile | Rewritten, feeds: Arrays, *outputs: str) -> Arrays:
    content = model.content() if isinstance(model, Rewritten) else bytes(model.buffer)
    folder = model.source.folder if isinstance(model, Rewritten) else model.folder
    return Session(content, "cpu", folder, threads=1).run(feeds, outputs or None)


def run_model(model: ModelProto, feeds: Arrays) -> Arrays:
    """All outputs of a model by name."""
    return Session(model.SerializeToString(), "cpu", threads=1).run(feeds)


def assert_patch(
    before: ModelFile, after: Rewritten, *, rewired: int, added: int | None = None, removed: int = 0
) -> Difference:
    """Everything of `before` is in `after` byte for byte, but for `rewired` input slots."""
    content = after.content()
    onnx.checker.check_model(content)
    found = compare(before, ModelFile.from_bytes(content, before.path))
    assert len(found.rewired) == rewired
    there = ModelFile.from_bytes(content).nodes
    assert len(before.nodes) + len(found.inserted_nodes) - len(there) == removed
    assert added is None or len(found.inserted_nodes) == added
    assert all(name.startswith("atpatch/") for name in found.inserted_nodes)
    return found


def reference(
    probabilities: NDArray[np.floating],
    flagged: NDArray[np.bool_],
    benign: NDArray[np.floating] | None,
    *,
    uniform: bool = False,
) -> NDArray[np.float64]:
    """Joint redistribution in float64, row by row, as DESIGN says it in words."""
    p = probabilities.astype(np.float64)
    m = np.broadcast_to(flagged, p.shape)
    b = np.zeros_like(p) if benign is None else np.broadcast_to(benign, p.shape).astype(np.float64)
    out = p.copy()
    for index in np.ndindex(p.shape[:-1]):
        row, flags = p[index], m[index] & (p[index] > 0)
        rest, mass = row[~flags].sum(), row.sum()
        if uniform:
            wanted = np.where(flags, mass / max((row > 0).sum(), 1), 0.0)
        else:
            wanted = np.where(flags, b[index], 0.0)
        asked = wanted.sum()
        if not flags.any() or (rest <= 1e-30 and asked <= 1e-30):
            continue
        given = min(asked, mass) if rest > 1e-30 else mass
        if asked > 1e-30:
            wanted = wanted * (given / asked)
        kept = np.where(flags, 0.0, row)
        out[index] = wanted + (kept * ((mass - given) / rest) if rest > 1e-30 else 0.0)
    return out

"""A repair of heads: a low-rank correction of what they give, as a detector of scope `context`.

    context [B, H, Q, D] ──► [B, Q, H*D] ──► V^T ──► [B, Q, r] ──► U ──► + b ──► [B, H, Q, D]
    corrected = context + correction                      (zero at heads that are not repaired)

It stands in front of the output projection, as new tensors beside the weights. Inspired by the
head-wise alignment of arXiv 2511.13789, whose formulas are not public.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from .fragment import Constants, Fragment

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Correction:
    """The correction of one site's heads: u v^T z + bias for the context z of a token.

    Shapes: u, v `[H, D, r]`, bias `[H, D]`; zero at heads that are left alone.
    """

    u: Floats
    v: Floats
    bias: Floats

    @property
    def heads(self) -> NDArray[np.bool_]:
        """The heads that it changes, `[H]`."""
        changed = self.u.any(axis=(1, 2)) | self.bias.any(axis=1)
        return np.asarray(changed, np.bool_)

    def __call__(self, context: NDArray[np.floating]) -> NDArray[np.floating]:
        """The corrected context `[B, H, Q, D]`, in its own precision."""
        codes = np.einsum("bhqd,hdr->bqr", context, self.v)
        return np.asarray(context + np.einsum("bqr,hdr->bhqd", codes, self.u) + self.bias[:, None])


def build_head_repair(corrections: Sequence[Correction], opset: int, ir_version: int) -> ModelProto:
    """The repair `context, layer -> corrected` of sites with heads of one number and size.

    layer: index into `corrections`. Ranks may differ. Raises: ValueError for other sizes.
    """
    shapes = {correction.bias.shape for correction in corrections}
    if len(shapes) != 1:
        raise ValueError(f"one repair is for heads of one number and size, found {sorted(shapes)}")
    heads, size = next(iter(shapes))
    rank = max(correction.u.shape[2] for correction in corrections)
    u, v = (np.zeros((len(corrections), heads * size, rank), np.float32) for _ in range(2))
    for index, correction in enumerate(corrections):
        own = correction.u.shape[2]
        u[index, :, :own] = correction.u.reshape(-1, own)
        v[index, :, :own] = correction.v.reshape(-1, own)
    f = Fragment("repair", opset, Constants("repair"))
    tables = {
        "v": v,
        "u": u.transpose(0, 2, 1),
        "bias": np.stack([c.bias.reshape(-1) for c in corrections]),
    }
    there = {
        name: f.op(
            "Gather",
            f.constants.add(name, np.ascontiguousarray(table)),
            "layer",
            name=f"site_{name}",
            axis=0,
        )
        for name, table in tables.items()
    }
    by_token = f.op("Transpose", "context", name="by_token", perm=[0, 2, 1, 3])
    token = f.op("Reshape", by_token, f.ints(0, 0, heads * size), name="token")
    codes = f.op("MatMul", token, there["v"], name="codes")
    moved = f.op("MatMul", codes, there["u"], name="moved")
    change = f.op("Add", moved, there["bias"], name="change")
    split = f.op("Reshape", change, f.ints(0, 0, heads, size), name="change_split")
    by_head = f.op("Transpose", split, name="change_by_head", perm=[0, 2, 1, 3])
    last = helper.make_node("Add", ["context", by_head], ["corrected"], "corrected")
    value = helper.make_tensor_value_info
    shape: list[str | int | None] = ["B", heads, "Q", size]
    graph = helper.make_graph(
        [*f.nodes(), last],
        "head_repair",
        [value("context", TensorProto.FLOAT, shape), value("layer", TensorProto.INT64, [])],
        [value("corrected", TensorProto.FLOAT, shape)],
        initializer=list(f.constants.tensors.values()),
    )
    imports = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=ir_version)
    onnx.checker.check_model(model)
    return model

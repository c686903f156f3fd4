"""`MultiHeadAttention` nodes in every layout, with every mask, and inputs for them."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import ModelProto

from atpatch_onnx.passes.opening.multi_head import MultiHeadAttention
from atpatch_onnx.runtime import Arrays

from contrib_nodes import Array, node_model, normal

OP = "MultiHeadAttention"
SLOTS = " ".join(MultiHeadAttention.slots)
B, Q, H, D = 2, 4, 2, 8
PRESENT = "output present_key present_value"


def layout(name: str, dtype: Any = np.float32) -> tuple[dict[str, Array], int, int]:
    """Queries, keys and values; how many keys there are, and how many of them are new."""

    def some(seed: int, *shape: int) -> Array:
        return normal(seed, *shape, dtype=dtype)

    new = 7 if name in ("cross", "projected") else Q
    queries = 1 if "step" in name else Q
    new = 1 if "step" in name else new
    width = H * 12 if name == "wide values" else H * D
    values = {"query": some(1, B, queries, H * D)}
    if "projected" in name:
        values |= {"key": some(2, B, H, new, D), "value": some(3, B, H, new, D)}
    else:
        values |= {"key": some(2, B, new, H * D), "value": some(3, B, new, width)}
    past = 5 if "past" in name or "buffer" in name else 0
    if past:
        longest = 12 if "buffer" in name else past
        values |= {"past_key": some(4, B, H, longest, D), "past_value": some(5, B, H, longest, D)}
    if "buffer" in name:
        values["past_sequence_length"] = np.array([past], np.int32)
    return values, past + new, queries


LAYOUTS = [
    "self",
    "wide values",
    "cross",
    "projected",
    "past",
    "projected with past",
    "step with past",
    "step with buffer",
    "buffer",
]
MASKS = ["", "ends", "ends, cumulative", "keys", "pairs"]
BIASES = [None, (B, H), (1, H), (B, 1), (1, 1)]


def mask_of(name: str, queries: int, keys: int) -> Array:
    ends = [keys - 2, keys]
    if name.startswith("ends"):
        sums = [0, queries, 2 * queries, 0, keys, 2 * keys]
        return np.array(ends + (sums if "," in name else []), np.int32)
    shape = (B, keys) if name == "keys" else (B, queries, keys)
    mask = np.random.default_rng(6).integers(0, 2, shape).astype(np.int32)
    mask[..., 0] = 1
    return mask


def case(
    name: str,
    mask: str = "",
    bias: tuple[int, int] | None = None,
    projection: bool = False,
    dtype: Any = np.float32,
    **options: Any,
) -> tuple[ModelProto, Arrays]:
    values, keys, queries = layout(name, dtype)
    if mask:
        values["key_padding_mask"] = mask_of(mask, queries, keys)
    if bias:
        values["attention_bias"] = normal(7, *bias, queries, keys, dtype=dtype)
    if projection:
        size = 2 * H * D + (H * 12 if name == "wide values" else H * D)
        values["bias"] = normal(8, size, dtype=dtype)
    outputs = PRESENT if "past_key" in values else "output"
    return node_model(OP, SLOTS, values, **{"outputs": outputs, "num_heads": H, **options})

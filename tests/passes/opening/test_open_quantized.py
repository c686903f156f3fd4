"""`QAttention`, opened, against ONNX Runtime's own kernel.

Invariants: the same output for every quantisation, mask and cache; sampled rows are rows of the
map; what cannot be opened says why.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto

from atpatch_onnx.passes.opening.quantized_attention import QAttention, open_quantized_attention
from atpatch_onnx.runtime import Arrays

from contrib_nodes import (
    TOLERANCE,
    Array,
    assert_rows_are_sampled,
    heads_of,
    joined,
    node_model,
    normal,
    softmax_of,
)
from hosts import run_model
from opened import compare, deviation, opened_model, reason_closed

SLOTS = " ".join(QAttention.slots)
WEIGHTS = "weights bias input_scale weight_scale input_zero_point weight_zero_point"
B, Q, H, D, E = 3, 4, 2, 8, 12
ALL = 3 * H * D


def case(
    mask: str = "",
    *,
    past: int = 0,
    columns: bool = False,
    zeros: str = "both",
    vectors: bool = False,
    signed: tuple[bool, bool] = (False, True),
    dtype: Any = np.float32,
    weights: str = WEIGHTS,
    **options: Any,
) -> tuple[ModelProto, Arrays]:
    random, keys = np.random.default_rng(1), past + Q
    kinds = [np.int8 if s else np.uint8 for s in signed]
    shape: tuple[int, ...] = (1,) if vectors else ()
    per_column = (ALL,) if columns else shape
    middle = [0 if s else 128 for s in signed]
    values: dict[str, Array] = {
        "input": (random.integers(-128, 128, (B, Q, E)) + middle[0]).astype(kinds[0]),
        "weights": (random.integers(-128, 128, (E, ALL)) + middle[1]).astype(kinds[1]),
        "bias": normal(2, ALL, dtype=dtype),
        "input_scale": np.full(shape, 0.015, dtype),
        "weight_scale": np.array(0.003 * (1 + random.random(per_column)), dtype),
    }
    if zeros != "none":
        values["input_zero_point"] = np.full(shape, middle[0] + 3, kinds[0])
    if zeros == "both":
        offset = random.integers(-5, 6, per_column) + middle[1]
        values["weight_zero_point"] = np.array(offset, kinds[1])
    if mask == "ends":
        values["mask_index"] = np.array([keys - 2, keys, keys - 1], np.int32)
    elif mask == "ends, starts":
        values["mask_index"] = np.array([keys - 1, keys, keys, 0, 2, 1], np.int32)
    elif mask:
        values["mask_index"] = random.integers(0, 2, (B, keys)).astype(np.int32)
    if past:
        values["past"] = normal(3, 2, B, H, past, D, dtype=dtype)
    outputs = "output present" if past else "output"
    given = {"outputs": outputs, "weights": weights, "num_heads": H, **options}
    return node_model("QAttention", SLOTS, values, **given)


def assert_opened(model: ModelProto, feeds: Arrays, tolerance: float = 1e-5) -> None:
    compare(model, opened_model(model, open_quantized_attention), feeds, tolerance)


@pytest.mark.parametrize(
    ("columns", "zeros", "vectors", "signed", "weights"),
    [
        *product(
            [False, True],
            ["none", "input", "both"],
            [False, True],
            [(False, True), (False, False)],
            ["", WEIGHTS],
        )
    ],
)
def test_every_quantisation(
    columns: bool, zeros: str, vectors: bool, signed: tuple[bool, bool], weights: str
) -> None:
    model, feeds = case(
        columns=columns, zeros=zeros, vectors=vectors, signed=signed, weights=weights
    )
    assert_opened(model, feeds)


@pytest.mark.parametrize(
    ("mask", "past", "causal", "symbolic"),
    [*product(["", "ends", "ends, starts", "keys"], [0, 3], [0, 1], [False, True])],
)
def test_every_mask(mask: str, past: int, causal: int, symbolic: bool) -> None:
    model, feeds = case(mask, past=past, unidirectional=causal, symbolic=symbolic, scale=0.3)
    assert_opened(model, feeds)
    assert_rows_are_sampled(model, open_quantized_attention, feeds, 3)


@pytest.mark.parametrize(("mask", "past"), [*product(["", "keys"], [0, 3])])
def test_float16(mask: str, past: int) -> None:
    """ONNX Runtime's CPU kernel has none: the reference is its float32 kernel."""
    model, feeds = case(mask, past=past, dtype=np.float16, weights="", outputs="output")
    plain, _ = case(mask, past=past, weights="")
    wide = {n: v.astype(np.float32) if v.dtype == np.float16 else v for n, v in feeds.items()}
    wanted = run_model(plain, wide)["output"].astype(np.float16)
    found = run_model(opened_model(model, open_quantized_attention), feeds)["output"]
    deviation(found, wanted, TOLERANCE[np.dtype(np.float16)])


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("zeros", ["none", "input"])
def test_signed_input(columns: bool, zeros: str) -> None:
    """ONNX Runtime's CPU kernel has none: the reference is NumPy."""
    model, feeds = case(columns=columns, zeros=zeros, signed=(True, True), weights="")
    zero = feeds.get("input_zero_point", np.int8(0)).astype(np.int64)
    product_of = (feeds["input"].astype(np.int64) - zero) @ feeds["weights"].astype(np.int64)
    flat = product_of * (feeds["input_scale"] * feeds["weight_scale"]) + feeds["bias"]
    query, key, value = (heads_of(x, H) for x in np.split(flat, 3, axis=-1))
    wanted = joined(softmax_of(query, key, 0.0) @ value).astype(np.float32)
    found = run_model(opened_model(model, open_quantized_attention), feeds)["output"]
    deviation(found, wanted, 1e-5)


@pytest.mark.parametrize("opset", [10, 11, 13, 18, 23])
def test_every_opset(opset: int) -> None:
    assert_opened(*case("keys", past=3, unidirectional=1, opset=opset, columns=True))


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("attribute 'softcap'", {"softcap": 3.0}),
        ("rotates queries and keys", {"do_rotary": 1}),
        ("opset 9", {"opset": 9}),
    ],
)
def test_closed_with_the_reason(reason: str, changes: dict[str, Any]) -> None:
    assert reason in reason_closed(case(**changes)[0], open_quantized_attention)


def test_closed_without_a_scale() -> None:
    model, _ = case()
    model.graph.node[0].input[4] = ""
    assert "lacks its input 'weight_scale'" in reason_closed(model, open_quantized_attention)

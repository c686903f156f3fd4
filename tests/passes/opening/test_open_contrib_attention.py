"""com.microsoft `Attention`, opened, against ONNX Runtime's own kernel.

Invariants: the same output for every mask, bias, cache and size; weights are read as they are; the
map is the kernel's own; sampled rows are rows of the map; what cannot be opened says why.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from atpatch_onnx.passes.graph_view import GraphView
from atpatch_onnx.passes.opening.contrib_attention import Attention, open_contrib_attention
from atpatch_onnx.runtime import Arrays

from contrib_nodes import (
    LOWEST,
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
from opened import compare, deviation, opened_model, probabilities_model, reason_closed

OP = "Attention"
SLOTS = " ".join(Attention.slots)
B, Q, H, D, E = 3, 4, 2, 8, 12
MASKS = ["", "ends", "ends, starts", "ends, cumulative", "keys", "pairs", "[B, 1]", "[1, 1]"]


def mask_of(name: str, keys: int) -> Array:
    random = np.random.default_rng(6)
    if name.startswith("ends"):
        ends = [keys - 2, keys, keys - 1]
        more = {"ends": [], "ends, starts": [0, 2, 1]}
        sums = [*range(0, (B + 1) * Q, Q), *range(0, (B + 1) * keys, keys)]
        return np.array(ends + more.get(name, sums), np.int32)
    if name.startswith("["):
        return np.zeros((B if "B" in name else 1, 1), np.int32)
    mask = random.integers(0, 2, (B, keys) if name == "keys" else (B, Q, keys)).astype(np.int32)
    mask[..., 0] = 1
    return mask


def case(
    mask: str = "",
    *,
    past: int = 0,
    bias: tuple[int, int] | None = None,
    wide: bool = False,
    dtype: Any = np.float32,
    weights: str = "weights bias",
    **options: Any,
) -> tuple[ModelProto, Arrays]:
    sizes = [H * D, H * D, H * 12 if wide else H * D]
    keys = past + Q
    values = {
        "input": normal(1, B, Q, E, dtype=dtype),
        "weights": normal(2, E, sum(sizes), dtype=dtype) / np.sqrt(E).astype(dtype),
        "bias": normal(3, sum(sizes), dtype=dtype),
    }
    if mask:
        values["mask_index"] = mask_of(mask, keys)
    if past:
        values["past"] = normal(4, 2, B, H, past, D, dtype=dtype)
    if bias:
        values["attention_bias"] = normal(5, *bias, Q, keys, dtype=dtype)
    if wide:
        options["qkv_hidden_sizes"] = sizes
    outputs = "output present" if past else "output"
    given = {"outputs": outputs, "weights": weights, "num_heads": H, **options}
    return node_model(OP, SLOTS, values, **given)


def assert_opened(model: ModelProto, feeds: Arrays) -> None:
    opened = opened_model(model, open_contrib_attention)
    compare(model, opened, feeds, TOLERANCE[feeds["input"].dtype])


@pytest.mark.parametrize(
    ("mask", "past", "causal", "symbolic"),
    [*product(MASKS, [0, 3], [0, 1], [False, True])],
)
def test_every_mask(mask: str, past: int, causal: int, symbolic: bool) -> None:
    assert_opened(*case(mask, past=past, unidirectional=causal, symbolic=symbolic))


@pytest.mark.parametrize("bias", [(B, H), (1, H), (B, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("mask", ["", "ends", "pairs"])
def test_bias_of_the_scores(bias: tuple[int, int], mask: str) -> None:
    assert_opened(*case(mask, bias=bias))


@pytest.mark.parametrize("weights", ["weights bias", "weights", ""])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("symbolic", [False, True])
def test_sizes_and_where_weights_come_from(wide: bool, weights: str, symbolic: bool) -> None:
    model, feeds = case("keys", wide=wide, weights=weights, symbolic=symbolic, outputs="output")
    assert_opened(model, feeds)
    assert_rows_are_sampled(model, open_contrib_attention, feeds, 2)
    opened = opened_model(model, open_contrib_attention)
    tensors = {t.name: t for t in opened.graph.initializer}
    assert all(tensors[t.name] == t for t in model.graph.initializer)


@pytest.mark.parametrize("present", ["output", "output present"])
def test_present_without_past(present: str) -> None:
    assert_opened(*case("keys", outputs=present, unidirectional=1))


@pytest.mark.parametrize(
    ("mask", "past", "causal"), [*product(["", "keys", "ends, starts"], [0, 3], [0, 1])]
)
def test_float16(mask: str, past: int, causal: int) -> None:
    bias = None if past else (1, H)
    model, feeds = case(mask, past=past, bias=bias, dtype=np.float16, unidirectional=causal)
    assert_opened(model, feeds)


@pytest.mark.parametrize("hidden", [-1.0, -10000.0, LOWEST])
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("mask", ["ends", "ends, starts", "keys", "pairs"])
def test_rows_whose_keys_are_all_padding(mask: str, causal: int, hidden: float) -> None:
    model, feeds = case(mask, mask_filter_value=hidden, unidirectional=causal, scale=0.3)
    feeds["mask_index"][0] = 0
    assert_opened(model, feeds)


@pytest.mark.parametrize("rows", [1, 3, 6])
@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("mask", ["", "ends, starts", "pairs"])
def test_sampled_rows(mask: str, past: int, rows: int) -> None:
    bias = None if past else (1, H)
    model, feeds = case(mask, past=past, bias=bias, unidirectional=1)
    assert_rows_are_sampled(model, open_contrib_attention, feeds, rows)


@pytest.mark.parametrize("mask", ["", "keys", "pairs"])
@pytest.mark.parametrize("causal", [0, 1])
def test_the_map_is_the_kernels(mask: str, causal: int) -> None:
    """Values are one-hot positions: the context is the map."""
    model, feeds = case(mask, weights="", unidirectional=causal, qkv_hidden_sizes=[16, 16, H * Q])
    feeds["input"][..., :Q] = np.eye(Q)
    once = np.zeros((E, Q), np.float32)
    once[:Q] = np.eye(Q)
    feeds["weights"] = np.concatenate([feeds["weights"][:, :32], *([once] * H)], axis=1)
    feeds["bias"] = np.concatenate([feeds["bias"][:32], np.zeros(H * Q, np.float32)])
    for value in model.graph.input:
        if value.name in ("weights", "bias"):
            value.type.tensor_type.shape.dim[-1].dim_value = 32 + H * Q
    (found,) = run_model(probabilities_model(model, open_contrib_attention), feeds).values()
    deviation(found, heads_of(run_model(model, feeds)["output"], H), 1e-6)


def reference(feeds: Arrays, key: Array, value: Array, added: Array | float) -> Array:
    query = parts(feeds)[0]
    wanted: Array = joined(softmax_of(query, key, added) @ value).astype(np.float32)
    return wanted


def parts(feeds: Arrays) -> list[Array]:
    bias = feeds.get("bias", np.zeros(3 * H * D, np.float32))
    flat = feeds["input"] @ feeds["weights"] + bias
    return [heads_of(part, H) for part in np.split(flat, 3, axis=-1)]


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("present", ["output", "output present"])
@pytest.mark.parametrize("filled", [0, 4])
def test_past_and_present_in_one_buffer(filled: int, present: str, scalar: bool) -> None:
    """ONNX Runtime's CPU kernel has none: NumPy, and a present that is given."""
    model, feeds = case(
        past=9, weights="", outputs=present, past_present_share_buffer=1, unidirectional=1
    )
    model.graph.node[0].input.extend(["", "past_sequence_length"])
    feeds["past_sequence_length"] = np.array(filled if scalar else [filled], np.int32)
    info = helper.make_tensor_value_info
    shape = feeds["past_sequence_length"].shape
    model.graph.input.append(info("past_sequence_length", TensorProto.INT32, shape))
    opened = opened_model(model, open_contrib_attention)
    _, key, value = parts(feeds)
    whole = feeds["past"].copy()
    whole[0, :, :, filled : filled + Q], whole[1, :, :, filled : filled + Q] = key, value
    if "present" in present:
        opened.graph.node.remove(next(n for n in opened.graph.node if n.domain))
        opened.graph.input.append(info("present", TensorProto.FLOAT, whole.shape))
        del opened.graph.output[1:]
        feeds["present"] = whole
    names = {value.name for value in opened.graph.input}
    found = run_model(opened, {n: v for n, v in feeds.items() if n in names})["output"]
    later = np.triu(np.full((Q, filled + Q), -np.inf), filled + 1)
    key, value = whole[:, :, :, : filled + Q]
    deviation(found, reference(feeds, key, value, later), 1e-5)


@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("rows", [None, 2])
def test_square_mask_of_megatron(past: int, rows: int | None) -> None:
    """ONNX Runtime's CPU kernel has none: NumPy."""
    model, feeds = case("keys", past=past, weights="", outputs="output")
    longest, keys = 9, past + Q
    square = np.random.default_rng(1).integers(0, 2, (B, 1, longest, longest)).astype(np.int32)
    square[..., 0] = 1
    feeds["mask_index"] = square
    slot = next(v for v in model.graph.input if v.name == "mask_index")
    slot.CopyFrom(helper.make_tensor_value_info("mask_index", TensorProto.INT32, square.shape))
    _, key, value = parts(feeds)
    if past:
        key, value = (
            np.concatenate([old, x], axis=2)
            for old, x in zip(feeds["past"], (key, value), strict=True)
        )
    seen = square[:, :, past:keys, :keys]
    wanted = reference(feeds, key, value, np.where(seen, 0.0, -10000.0))
    deviation(run_model(opened_model(model, open_contrib_attention), feeds)["output"], wanted, 1e-5)
    if rows:
        assert_rows_are_sampled(model, open_contrib_attention, feeds, rows)


def test_without_bias() -> None:
    """ONNX Runtime's CPU kernel needs one: NumPy."""
    model, feeds = case(weights="")
    model.graph.node[0].input[2] = ""
    del feeds["bias"]
    del model.graph.input[2]
    _, key, value = parts(feeds)
    found = run_model(opened_model(model, open_contrib_attention), feeds)["output"]
    deviation(found, reference(feeds, key, value, 0.0), 1e-5)


@pytest.mark.parametrize("opset", [10, 11, 13, 18, 23])
def test_every_opset(opset: int) -> None:
    for mask in ("ends, starts", "keys", "pairs"):
        assert_opened(*case(mask, past=3, unidirectional=1, opset=opset))


def test_bfloat16_reaches_every_node() -> None:
    """ONNX Runtime's CPU provider runs no bfloat16: the types are checked as a model's."""
    model, _ = case("keys", bias=(1, H), weights="", unidirectional=1)
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    onnx.checker.check_model(opened_model(model, open_contrib_attention), full_check=True)


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("attribute 'softcap'", {"softcap": 3.0}),
        ("rotates queries and keys", {"do_rotary": 1}),
        ("no 'num_heads'", {"num_heads": 0}),
        ("value 2 for 'unidirectional'", {"unidirectional": 2}),
        ("opset 9", {"opset": 9}),
        ("qkv_hidden_sizes [16, 32, 16]", {"qkv_hidden_sizes": [16, 32, 16]}),
        ("no past_sequence_length", {"past_present_share_buffer": 1, "past": 3}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_closed_with_the_reason(reason: str, changes: dict[str, Any]) -> None:
    model, _ = case(**changes)
    assert reason in reason_closed(model, open_contrib_attention)


def test_closed_where_the_rank_of_the_mask_is_unknown() -> None:
    model, _ = case("keys")
    model.graph.input[1].type.tensor_type.ClearField("shape")
    assert "a mask_index of a rank" in reason_closed(model, open_contrib_attention)


def test_a_sum_over_a_mask_of_unknown_rank_is_a_row_of_ends() -> None:
    model, _ = case("ends")
    mask = model.graph.input[1]
    assert mask.name == "mask_index"
    mask.CopyFrom(helper.make_tensor_value_info("raw", TensorProto.INT32, None))
    summing = helper.make_node("ReduceSum", ["raw", "last"], ["sums"], keepdims=0)
    casting = helper.make_node("Cast", ["sums"], ["mask_index"], to=TensorProto.INT32)
    nodes = [summing, casting, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    opening = open_contrib_attention(GraphView.of(model), model.graph.node[-1])
    assert isinstance(opening, Attention)
    assert opening.mask_rank == 1

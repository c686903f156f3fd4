"""`PackedAttention` and `PackedMultiHeadAttention`, opened, against float64 NumPy: ONNX Runtime has
only CUDA kernels.

Invariants: every sample as if it were alone, without padding; padding has probability 0; sampled
rows are rows of the map; what cannot be opened says why.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto

from atpatch_onnx.passes.fragment import Constants, Fragment
from atpatch_onnx.passes.opening.packed import (
    PackedAttention,
    PackedMultiHeadAttention,
    open_packed_attention,
    open_packed_multi_head,
)
from atpatch_onnx.runtime import Arrays

from contrib_nodes import (
    TOLERANCE,
    Array,
    assert_rows_are_sampled,
    node_model,
    normal,
    softmax_of,
)
from hosts import run_model
from opened import deviation, opened_model, opening_of, probabilities_model, reason_closed

H, D, E, Q = 2, 8, 12, 5
LENGTHS = [(1, 2, 4), (5, 5), (3,), (2, 5, 1, 4)]


def packing(lengths: tuple[int, ...]) -> dict[str, Array]:
    real = np.arange(Q) < np.array(lengths)[:, None]
    order = np.concatenate([np.flatnonzero(real), np.flatnonzero(~real)])
    return {
        "token_offset": order.reshape(len(lengths), Q).astype(np.int32),
        "cumulative_sequence_length": np.cumsum([0, *lengths]).astype(np.int32),
    }


def case(
    lengths: tuple[int, ...],
    bias: tuple[int, int] | None = None,
    wide: bool = False,
    dtype: Any = np.float32,
    weights: str = "weights bias",
    **options: Any,
) -> tuple[ModelProto, Arrays, list[Array]]:
    """A `PackedAttention`, and what it projects: `[T, H*D]` each."""
    sizes = [H * D, H * D, H * 12 if wide else H * D]
    values = {
        "input": normal(1, sum(lengths), E, dtype=dtype),
        "weights": normal(2, E, sum(sizes), dtype=dtype) / np.sqrt(E).astype(dtype),
        "bias": normal(3, sum(sizes), dtype=dtype),
        **packing(lengths),
    }
    if bias:
        values["attention_bias"] = normal(4, *bias, Q, Q, dtype=dtype)
    if wide:
        options["qkv_hidden_sizes"] = sizes
    x, w, b = (values[n].astype(np.float64) for n in ("input", "weights", "bias"))
    parts = np.split(x @ w + b, np.cumsum(sizes)[:2], axis=1)
    model, feeds = node_model(
        "PackedAttention",
        " ".join(PackedAttention.slots),
        values,
        **{"weights": weights, "num_heads": H, "rank": 2, **options},
    )
    return model, {**feeds, **{n: values[n] for n in packing(lengths)}}, parts


def multi_head_case(
    lengths: tuple[int, ...],
    form: str,
    bias: tuple[int, int] | None = None,
    projection: bool = False,
    dtype: Any = np.float32,
    **options: Any,
) -> tuple[ModelProto, Arrays, list[Array]]:
    """A `PackedMultiHeadAttention`, and what its bias makes of its inputs."""
    sizes = [H * D, H * D, H * 12 if form == "wide values" else H * D]
    parts = [normal(i, sum(lengths), size, dtype=dtype) for i, size in enumerate(sizes)]
    if form == "packed":
        stacked = np.stack([p.reshape(-1, H, D) for p in parts], axis=2)
        values: dict[str, Array] = {"query": stacked}
    else:
        values = dict(zip(("query", "key", "value"), parts, strict=True))
    values |= packing(lengths)
    if bias:
        values["attention_bias"] = normal(4, *bias, Q, Q, dtype=dtype)
    if projection:
        values["bias"] = normal(5, sum(sizes), dtype=dtype)
        shifts = np.split(values["bias"].astype(np.float64), np.cumsum(sizes)[:2])
        parts = [p + shift for p, shift in zip(parts, shifts, strict=True)]
    slots = " ".join(PackedMultiHeadAttention.slots)
    given = {"num_heads": H, "rank": 2, **options}
    model, feeds = node_model("PackedMultiHeadAttention", slots, values, **given)
    return model, feeds, parts


def reference(
    lengths: tuple[int, ...], parts: list[Array], bias: Array | None, scale: float = 0.0
) -> tuple[Array, list[Array]]:
    """The output `[T, H*V]`, and the map of each sample."""
    ends = np.cumsum(lengths)[:-1]
    outputs, maps = [], []
    for sample, tokens in enumerate(zip(*(np.split(p, ends) for p in parts), strict=True)):
        query, key, value = (t.reshape(1, len(t), H, -1).swapaxes(1, 2) for t in tokens)
        size = lengths[sample]
        added = 0.0 if bias is None else bias[min(sample, len(bias) - 1)][None, :, :size, :size]
        maps.append(softmax_of(query, key, added, scale))
        outputs.append((maps[-1] @ value).swapaxes(1, 2).reshape(size, -1))
    return np.concatenate(outputs), maps


@pytest.mark.parametrize(
    ("lengths", "bias", "wide", "symbolic"),
    [*product(LENGTHS, [None, "own", "shared", "one"], [False, True], [False, True])],
    ids=str,
)
def test_packed_attention(
    lengths: tuple[int, ...], bias: str | None, wide: bool, symbolic: bool
) -> None:
    shape = {"own": (len(lengths), H), "shared": (1, H), "one": (1, 1)}.get(bias or "")
    weights = "" if symbolic else "weights bias"
    model, feeds, parts = case(lengths, shape, wide, symbolic=symbolic, weights=weights)
    found = run_model(opened_model(model, open_packed_attention), feeds)["output"]
    wanted, _ = reference(lengths, parts, feeds.get("attention_bias"))
    deviation(found, wanted.astype(np.float32), 1e-5)


@pytest.mark.parametrize(
    ("lengths", "form", "bias", "projection", "symbolic"),
    [
        *product(
            LENGTHS[:2],
            ["apart", "wide values", "packed"],
            [None, "own", "shared"],
            [False, True],
            [False, True],
        )
    ],
    ids=str,
)
def test_packed_multi_head(
    lengths: tuple[int, ...], form: str, bias: str | None, projection: bool, symbolic: bool
) -> None:
    shape = {"own": (len(lengths), H), "shared": (1, H)}.get(bias or "")
    model, feeds, parts = multi_head_case(lengths, form, shape, projection, symbolic=symbolic)
    found = run_model(opened_model(model, open_packed_multi_head), feeds)["output"]
    wanted, _ = reference(lengths, parts, feeds.get("attention_bias"))
    deviation(found, wanted.astype(np.float32), 1e-5)


@pytest.mark.parametrize("scale", [0.0, 0.9])
@pytest.mark.parametrize("bias", [None, (1, H)])
def test_float16(bias: tuple[int, int] | None, scale: float) -> None:
    lengths, tolerance = LENGTHS[0], TOLERANCE[np.dtype(np.float16)]
    for made, opener in (
        (case(lengths, bias, dtype=np.float16, scale=scale), open_packed_attention),
        (
            multi_head_case(lengths, "packed", bias, True, np.float16, scale=scale),
            open_packed_multi_head,
        ),
    ):
        model, feeds, parts = made
        found = run_model(opened_model(model, opener), feeds)["output"]
        wanted, _ = reference(lengths, parts, feeds.get("attention_bias"), scale)
        deviation(found, wanted.astype(np.float16), tolerance)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_the_map_is_that_of_each_sample_and_padding_has_none(lengths: tuple[int, ...]) -> None:
    model, feeds, parts = case(lengths, (1, H))
    (found,) = run_model(probabilities_model(model, open_packed_attention), feeds).values()
    assert found.shape == (len(lengths), H, Q, Q)
    for sample, wanted in enumerate(reference(lengths, parts, feeds["attention_bias"])[1]):
        size = lengths[sample]
        np.testing.assert_allclose(found[sample, :, :size, :size], wanted[0], atol=1e-6)
        assert (found[sample, :, :, size:] == 0).all()
    np.testing.assert_allclose(found.sum(-1), 1.0, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 7])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_sampled_rows(lengths: tuple[int, ...], rows: int) -> None:
    model, feeds, _ = case(lengths, (1, H))
    assert_rows_are_sampled(model, open_packed_attention, feeds, rows)
    model, feeds, _ = multi_head_case(lengths, "packed", (1, H), True)
    assert_rows_are_sampled(model, open_packed_multi_head, feeds, rows)


def test_a_sample_without_tokens() -> None:
    lengths = (2, 0, 3, 0)
    model, feeds, parts = multi_head_case(lengths, "apart")
    found = run_model(opened_model(model, open_packed_multi_head), feeds)["output"]
    full = [n for n in lengths if n]
    deviation(found, reference(tuple(full), parts, None)[0].astype(np.float32), 1e-5)


@pytest.mark.parametrize("opset", [10, 11, 13, 18, 23])
def test_every_opset(opset: int) -> None:
    lengths = LENGTHS[0]
    model, feeds, parts = multi_head_case(lengths, "packed", (1, H), True, opset=opset)
    found = run_model(opened_model(model, open_packed_multi_head), feeds)["output"]
    wanted, _ = reference(lengths, parts, feeds["attention_bias"])
    deviation(found, wanted.astype(np.float32), 1e-5)


def test_bfloat16_reaches_every_node() -> None:
    """ONNX Runtime's CPU provider runs no bfloat16: the types are checked as a model's."""
    model, _, _ = case(LENGTHS[0], (1, H), weights="")
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    onnx.checker.check_model(opened_model(model, open_packed_attention), full_check=True)


def test_closed_with_the_reason() -> None:
    model, _, _ = case(LENGTHS[0], unidirectional=1)
    assert "attribute 'unidirectional'" in reason_closed(model, open_packed_attention)
    model, _, _ = case(LENGTHS[0], opset=9)
    assert "opset 9" in reason_closed(model, open_packed_attention)
    model, _, _ = multi_head_case(LENGTHS[0], "apart", do_rotary=1)
    assert "attribute 'do_rotary'" in reason_closed(model, open_packed_multi_head)


@pytest.mark.parametrize("missing", ["key", "value", "token_offset", "cumulative_sequence_length"])
def test_closed_where_an_input_is_missing(missing: str) -> None:
    model, _, _ = multi_head_case(LENGTHS[0], "apart")
    model.graph.node[0].input[PackedMultiHeadAttention.slots.index(missing)] = ""
    assert f"lacks its input '{missing}'" in reason_closed(model, open_packed_multi_head)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_only_tokens_of_flagged_samples_change(lengths: tuple[int, ...]) -> None:
    model, feeds, _ = case(lengths)
    opening = opening_of(model, open_packed_attention)
    constants = Constants("c")
    f = Fragment("chosen", opening.view.opset, constants)
    output = opening.choose(f, "sample", "new", "old")
    made = onnx.helper.make_model(
        onnx.helper.make_graph(
            f.nodes(),
            "choose",
            [
                onnx.helper.make_tensor_value_info("sample", TensorProto.BOOL, ["B", 1, 1, 1]),
                onnx.helper.make_tensor_value_info("token_offset", TensorProto.INT32, ["B", "S"]),
                *(
                    onnx.helper.make_tensor_value_info(n, TensorProto.FLOAT, ["T", "X"])
                    for n in ("input", "new", "old")
                ),
            ],
            [onnx.helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            initializer=list(constants.tensors.values()),
        ),
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
    )
    flags = np.arange(len(lengths)) % 2 == 0
    tokens = np.ones((sum(lengths), 3), np.float32)
    given = {
        "new": tokens,
        "old": 0 * tokens,
        "input": tokens,
        "sample": flags[:, None, None, None],
    }
    found = run_model(made, {**given, "token_offset": feeds["token_offset"]})[output]
    np.testing.assert_array_equal(found[:, 0], np.repeat(flags, lengths))

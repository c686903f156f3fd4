"""`DecoderMaskedMultiHeadAttention`, opened, against ONNX Runtime's own kernel.

Invariants: the same output with and without a cache, beams, masks and biases; the map is the
kernel's own; keys laid out for CUDA give the same; what cannot be opened says why.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto

from atpatch_onnx.passes.opening.decoder_masked import (
    DecoderMaskedMultiHeadAttention,
    open_decoder_masked,
)
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
from opened import compare, deviation, opened_model, probabilities_model, reason_closed

OP = "DecoderMaskedMultiHeadAttention"
# The operator's own names, in order.
SLOTS = " ".join(DecoderMaskedMultiHeadAttention.slots)
B, H, D, LONGEST = 4, 2, 8, 7
PRESENT = "output present_key present_value"


def case(
    filled: int | None,
    mask: bool = False,
    bias: tuple[int, int] | None = None,
    width: int = 0,
    projection: bool = False,
    dtype: Any = np.float32,
    **options: Any,
) -> tuple[ModelProto, Arrays]:
    """filled: tokens in the shared buffer; None for cross attention. width: of the beams."""

    def some(seed: int, *shape: int) -> Array:
        return normal(seed, *shape, dtype=dtype)

    values = {"query": some(1, B, 1, H * D)}
    keys = LONGEST if filled is None else filled + 1
    for seed, name in enumerate(("key", "value"), 2):
        if filled is None:
            values[name] = some(seed, B, H, LONGEST, D)
        else:
            values[name] = some(seed, B, 1, H * D)
            values[f"past_{name}"] = some(seed + 2, B, H, LONGEST, D)
    if mask:
        seen = np.random.default_rng(6).integers(0, 2, (B, keys)).astype(np.int32)
        seen[:, -1] = 1
        values["key_padding_mask"] = seen
    if bias:
        values["attention_bias"] = some(7, *bias, 1, keys)
    if filled is not None:
        values["past_sequence_length"] = np.array([filled], np.int32)
        options.setdefault("past_present_share_buffer", 1)
    if width:
        source = np.random.default_rng(8).integers(0, width, (B // width, width, LONGEST))
        values |= {
            "beam_width": np.array([width], np.int32),
            "cache_indirection": source.astype(np.int32),
        }
    if projection:
        values["bias"] = some(9, 3 * H * D)
    outputs = "output" if filled is None else PRESENT
    return node_model(OP, SLOTS, values, **{"outputs": outputs, "num_heads": H, **options})


def assert_opened(model: ModelProto, feeds: Arrays) -> None:
    opened = opened_model(model, open_decoder_masked)
    compare(model, opened, feeds, TOLERANCE[feeds["query"].dtype])


@pytest.mark.parametrize(
    ("filled", "mask", "bias", "projection", "symbolic"),
    [
        *product(
            [0, 4, LONGEST - 1], [False, True], [None, (B, H), (1, H)], [False, True], [False, True]
        )
    ],
)
def test_buffer(
    filled: int, mask: bool, bias: tuple[int, int] | None, projection: bool, symbolic: bool
) -> None:
    assert_opened(*case(filled, mask, bias, projection=projection, symbolic=symbolic))


@pytest.mark.parametrize(
    ("mask", "projection", "symbolic", "scale"),
    [*product([False, True], [False, True], [False, True], [0.0, 0.7])],
)
def test_cross_attention(mask: bool, projection: bool, symbolic: bool, scale: float) -> None:
    model, feeds = case(None, mask, projection=projection, symbolic=symbolic, scale=scale)
    assert_opened(model, feeds)
    assert_rows_are_sampled(model, open_decoder_masked, feeds, 2)


@pytest.mark.parametrize(
    ("filled", "width", "mask", "bias", "projection"),
    [*product([1, 4], [1, 2, 4], [False, True], [None, (B, H), (1, H)], [False, True])],
)
def test_beams(
    filled: int, width: int, mask: bool, bias: tuple[int, int] | None, projection: bool
) -> None:
    assert_opened(*case(filled, mask, bias, width, projection))


@pytest.mark.parametrize(("filled", "width", "mask"), [*product([None, 4], [0, 2], [False, True])])
def test_float16(filled: int | None, width: int, mask: bool) -> None:
    given = 0 if filled is None else width
    assert_opened(*case(filled, mask, None, given, True, np.float16))


@pytest.mark.parametrize("hidden", [-1.0, -10000.0])
def test_filter_value(hidden: float) -> None:
    model, feeds = case(4, True, mask_filter_value=hidden)
    feeds["key_padding_mask"][0] = 0
    assert_opened(model, feeds)


@pytest.mark.parametrize("mask", [False, True])
def test_the_map_is_the_kernels(mask: bool) -> None:
    model, feeds = case(None, mask)
    eye = np.zeros((B, H, LONGEST, D), np.float32)
    eye[..., :LONGEST] = np.eye(LONGEST)
    feeds["value"] = eye
    (found,) = run_model(probabilities_model(model, open_decoder_masked), feeds).values()
    kernel = heads_of(run_model(model, feeds)["output"], H)
    deviation(found, kernel[..., :LONGEST].copy(), 1e-6)


def test_further_outputs_stay() -> None:
    model, feeds = case(4, outputs=f"{PRESENT} qk", output_qk=1)
    assert_opened(model, feeds)


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("projection", [False, True])
def test_packed_as_the_kernel_does_unpacked(projection: bool, symbolic: bool) -> None:
    """ONNX Runtime's CPU kernel fails on a packed query: it is given the parts."""
    model, feeds = case(4, True, projection=projection)
    packed = np.concatenate([feeds[n] for n in ("query", "key", "value")], axis=2)
    values = {n: v for n, v in feeds.items() if n not in ("query", "key", "value")}
    options: dict[str, Any] = {"past_present_share_buffer": 1, "num_heads": H, "symbolic": symbolic}
    # Without the present outputs, which the kernel would have to make.
    opened, given = node_model(OP, SLOTS, {"query": packed, **values}, **options)
    found = run_model(opened_model(opened, open_decoder_masked), given)["output"]
    deviation(found, run_model(model, feeds)["output"], 1e-5)


@pytest.mark.parametrize("filled", [None, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_keys_laid_out_for_cuda(filled: int | None, dtype: Any) -> None:
    model, feeds = case(filled, True, outputs="output", dtype=dtype)
    plain = opened_model(model, open_decoder_masked)
    cuda = opened_model(model, lambda view, node: open_decoder_masked(view, node, True))
    name = "key" if filled is None else "past_key"
    apart = feeds[name].reshape(B, H, LONGEST, -1, 16 // np.dtype(dtype).itemsize)
    turned = apart.transpose(0, 1, 3, 2, 4).reshape(feeds[name].shape)
    found = run_model(cuda, {**feeds, name: turned})["output"]
    deviation(found, run_model(plain, feeds)["output"], 0.0)


@pytest.mark.parametrize("mask", [False, True])
def test_past_that_is_no_buffer(mask: bool) -> None:
    """ONNX Runtime's CPU kernel needs a shared buffer: NumPy."""
    model, feeds = case(LONGEST, mask, outputs="output")
    node = model.graph.node[0]
    node.input[DecoderMaskedMultiHeadAttention.slots.index("past_sequence_length")] = ""
    del node.attribute[:]
    node.attribute.extend(case(None)[0].graph.node[0].attribute)
    key, value = (
        np.concatenate([feeds[f"past_{n}"], heads_of(feeds[n], H)], axis=2)
        for n in ("key", "value")
    )
    added = np.where(feeds["key_padding_mask"] > 0, 0.0, -1e4)[:, None, None] if mask else 0.0
    wanted = joined(softmax_of(heads_of(feeds["query"], H), key, added) @ value)
    found = run_model(opened_model(model, open_decoder_masked), feeds)["output"]
    deviation(found, wanted.astype(np.float32), 1e-5)


@pytest.mark.parametrize("opset", [10, 11, 13, 18, 23])
def test_every_opset(opset: int) -> None:
    assert_opened(*case(4, True, (1, H), 2, True, opset=opset))
    assert_opened(*case(4, True, (1, H), 0, True, opset=opset))


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("attribute 'unidirectional'", {"unidirectional": 1}),
        ("value 3 for 'past_present_share_buffer'", {"past_present_share_buffer": 3}),
        ("value 2 for 'output_qk'", {"output_qk": 2}),
        ("opset 9", {"opset": 9}),
    ],
)
def test_closed_with_the_reason(reason: str, changes: dict[str, Any]) -> None:
    assert reason in reason_closed(case(4, **changes)[0], open_decoder_masked)


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("past_sequence_length", "no past_sequence_length"),
        ("past_value", "only one of past_key and past_value"),
        ("value", "lacks its input 'value'"),
        ("key", "lacks its input 'key'"),
    ],
)
def test_closed_where_an_input_is_missing(missing: str, reason: str) -> None:
    model, _ = case(4)
    slot = DecoderMaskedMultiHeadAttention.slots.index(missing)
    model.graph.node[0].input[slot] = ""
    assert reason in reason_closed(model, open_decoder_masked)

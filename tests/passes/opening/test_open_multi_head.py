"""`MultiHeadAttention`, opened, against ONNX Runtime's own kernel.

Invariants: the same output for every layout, mask, bias and cache; the map is the kernel's own;
sampled rows are rows of the map; what cannot be opened says why.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import ModelProto, TensorProto, helper

from atpatch_onnx.passes.graph_view import GraphView
from atpatch_onnx.passes.opening.multi_head import MultiHeadAttention, open_multi_head
from atpatch_onnx.runtime import Arrays

from contrib_nodes import (
    LOWEST,
    TOLERANCE,
    assert_rows_are_sampled,
    heads_of,
    joined,
    node_model,
    normal,
    softmax_of,
)
from hosts import run_model
from multi_head_cases import BIASES, LAYOUTS, MASKS, OP, PRESENT, SLOTS, B, D, H, Q, case, layout
from opened import compare, deviation, opened_model, probabilities_model, reason_closed


def assert_opened(model: ModelProto, feeds: Arrays) -> None:
    opened = opened_model(model, open_multi_head)
    compare(model, opened, feeds, TOLERANCE[feeds["query"].dtype])


@pytest.mark.parametrize("bias", BIASES[:2], ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_under_every_mask(
    name: str, causal: int, mask: str, bias: tuple[int, int] | None
) -> None:
    symbolic = (len(mask) + causal) % 2 == 1
    assert_opened(*case(name, mask, bias, unidirectional=causal, symbolic=symbolic))


@pytest.mark.parametrize(
    ("name", "symbolic", "mask"), [*product(LAYOUTS, [False, True], ["", "keys"])]
)
def test_bias_of_the_projections(name: str, symbolic: bool, mask: str) -> None:
    assert_opened(*case(name, mask, projection=True, symbolic=symbolic))


@pytest.mark.parametrize(
    ("name", "mask", "causal"),
    [*product(["self", "cross", "projected", "past", "step with buffer"], ["", "keys"], [0, 1])],
)
def test_float16(name: str, mask: str, causal: int) -> None:
    bias = (1, H) if causal else None
    model, feeds = case(name, mask, bias, not causal, np.float16, unidirectional=causal)
    assert_opened(model, feeds)


@pytest.mark.parametrize("bias", BIASES[2:], ids=str)
@pytest.mark.parametrize("name", ["self", "past", "step with buffer"])
def test_bias_that_is_broadcast(name: str, bias: tuple[int, int]) -> None:
    assert_opened(*case(name, "keys", bias))


@pytest.mark.parametrize("scale", [0.05, 1.0, -0.5])
@pytest.mark.parametrize("hidden", [-1.0, -10000.0, -65504.0, LOWEST])
@pytest.mark.parametrize("causal", [0, 1])
def test_scale_and_filter_value(scale: float, hidden: float, causal: int) -> None:
    assert_opened(
        *case("self", "keys", (1, H), scale=scale, mask_filter_value=hidden, unidirectional=causal)
    )


@pytest.mark.parametrize("hidden", [-1.0, -10000.0, LOWEST])
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_rows_whose_keys_are_all_padding(rank: int, causal: int, hidden: float) -> None:
    model, feeds = case("self", MASKS[(1, 3, 4)[rank - 1]], mask_filter_value=hidden)
    model.graph.node[0].attribute.append(helper.make_attribute("unidirectional", causal))
    feeds["key_padding_mask"][0] = 0
    assert_opened(model, feeds)


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("value", [-np.inf, LOWEST])
def test_a_bias_may_hide_keys_and_rows(value: float, causal: int) -> None:
    model, feeds = case("self", "keys", (B, H), unidirectional=causal, mask_filter_value=LOWEST)
    feeds["attention_bias"][0, 0, :, 1:] = value
    feeds["key_padding_mask"][:] = 1
    assert_opened(model, feeds)
    feeds["attention_bias"][0, 0, 1] = -np.inf  # the kernel's own is NaN
    feeds["key_padding_mask"][:] = 0
    found = run_model(opened_model(model, open_multi_head), feeds)["output"]
    assert np.isfinite(found).all()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [0, 1])
def test_the_map_is_the_kernels(mask: str, causal: int) -> None:
    model, feeds = case("self", mask, (1, H), unidirectional=causal)
    feeds["value"] = np.tile(np.eye(Q, dtype=np.float32), (B, 1, H))
    model.graph.input[2].CopyFrom(
        helper.make_tensor_value_info("value", TensorProto.FLOAT, [B, Q, H * Q])
    )
    (found,) = run_model(probabilities_model(model, open_multi_head), feeds).values()
    deviation(found, heads_of(run_model(model, feeds)["output"], H), 1e-6)


@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("name", ["self", "cross", "past", "projected", "step with buffer"])
@pytest.mark.parametrize("mask", ["", "pairs"])
def test_sampled_rows(name: str, mask: str, rows: int) -> None:
    model, feeds = case(name, mask, (1, H), projection=True, unidirectional=1)
    assert_rows_are_sampled(model, open_multi_head, feeds, rows)


@pytest.mark.parametrize("packing", ["all", "keys and values"])
@pytest.mark.parametrize(
    ("projection", "mask", "causal", "symbolic"),
    [*product([False, True], ["", "keys", "pairs"], [0, 1], [False, True])],
)
def test_packed_as_the_kernel_does_unpacked(
    packing: str, projection: bool, mask: str, causal: int, symbolic: bool
) -> None:
    """ONNX Runtime's CPU kernel takes nothing packed: it is given the parts."""
    options: dict[str, Any] = {"unidirectional": causal, "projection": projection}
    model, feeds = case("self", mask, (1, H), **options)
    parts = [feeds[n].reshape(B, Q, H, D) for n in ("query", "key", "value")]
    rest = {n: v for n, v in feeds.items() if n not in ("query", "key", "value")}
    if packing == "all":
        values = {"query": np.stack(parts, axis=3)}
    else:
        values = {"query": feeds["query"], "key": np.stack(parts[1:], axis=3)}
        rest.pop("bias", None)
        model, _ = case("self", mask, (1, H), unidirectional=causal)
        feeds.pop("bias", None)
    packed, given = node_model(
        OP, SLOTS, values | rest, num_heads=H, unidirectional=causal, symbolic=symbolic
    )
    found = run_model(opened_model(packed, open_multi_head), given)["output"]
    deviation(found, run_model(model, feeds)["output"], 1e-5)
    assert_rows_are_sampled(packed, open_multi_head, given, 3)


@pytest.mark.parametrize("name", ["past", "step with past", "projected with past"])
def test_past_without_present(name: str) -> None:
    """ONNX Runtime's CPU kernel reads beyond its keys then: the reference is NumPy."""
    model, feeds = case(name, outputs="output")
    new = [
        feeds[n] if feeds[n].ndim == 4 else heads_of(feeds[n], H) for n in ("query", "key", "value")
    ]
    key, value = (
        np.concatenate([feeds[f"past_{n}"], x], axis=2)
        for n, x in zip(("key", "value"), new[1:], strict=True)
    )
    wanted = joined(softmax_of(new[0], key, 0.0) @ value).astype(np.float32)
    found = run_model(opened_model(model, open_multi_head), feeds)["output"]
    deviation(found, wanted, 1e-5)


# Of a bias [B, 1, Q, K] the kernel takes, for row b, row b/W*H, as if there were H heads.
@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("bias", [None, (B, H), (1, H), (1, 1)], ids=str)
@pytest.mark.parametrize("mask", ["", "keys"])
def test_beams_that_share_a_cache(mask: str, bias: tuple[int, int] | None, queries: int) -> None:
    batch, width, filled, longest = 4, 2, 3, 6
    values = {n: normal(i, batch, queries, H * D) for i, n in enumerate(("query", "key", "value"))}
    values |= {f"past_{n}": normal(3, batch, H, longest, D) for n in ("key", "value")}
    values["past_sequence_length"] = np.array([filled], np.int32)
    source = np.random.default_rng(1).integers(0, width, (batch // width, width, longest))
    values["cache_indirection"] = source.astype(np.int32)
    keys = filled + queries
    if mask:
        hides = np.random.default_rng(2).integers(0, 2, (batch, keys))
        values["key_padding_mask"] = hides.astype(np.int32)
    if bias:
        shape = (batch if bias[0] > 1 else 1, bias[1], queries, keys)
        values["attention_bias"] = normal(4, *shape)
    for symbolic in (False, True):
        model, feeds = node_model(
            OP, SLOTS, values, outputs=PRESENT, num_heads=H, symbolic=symbolic
        )
        assert_opened(model, feeds)


@pytest.mark.parametrize("opset", [10, 11, 13, 18, 23])
def test_every_opset(opset: int) -> None:
    for mask in MASKS:
        assert_opened(*case("past", mask, (1, H), unidirectional=1, opset=opset))


def test_bfloat16_reaches_every_node() -> None:
    """ONNX Runtime's CPU provider runs no bfloat16: the types are checked as a model's."""
    model, _ = case("self", "keys", (1, H), projection=True, unidirectional=1)
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    onnx.checker.check_model(opened_model(model, open_multi_head), full_check=True)


def test_a_node_in_a_branch() -> None:
    """Everything that it reads is outside, and the graph says nothing of it within."""
    model, _ = case("past", "keys", (1, H), unidirectional=1)
    node = model.graph.node.pop()
    branch = helper.make_graph([node], "branch", [], [onnx.ValueInfoProto(name="output")])
    choice = helper.make_node("If", ["choice"], ["y"], "choose", then_branch=branch)
    model.graph.node.append(choice)
    (view,) = GraphView.of(model).nested()
    opening = open_multi_head(view, view.nodes[0])
    assert isinstance(opening, MultiHeadAttention)
    assert (opening.elem_type, opening.key_rank, opening.mask_rank) == (TensorProto.FLOAT, 3, 2)


CAUSAL = """
    host (float[2, 4, 16] x, float[2, 7, 16] e) => (float[2, 4, 16] y)
    <float[16, 16] w, float[1, 1, 4, 4] low> {
        q = MatMul (x, w)
        k = MatMul (%s, w)
        v = MatMul (%s, w)
        bias = Trilu <upper = 1> (low)
        y = com.microsoft.MultiHeadAttention <num_heads = 2> (q, k, v, , , %s)
    }
"""


@pytest.mark.parametrize("source", ["x", "e"])
@pytest.mark.parametrize("bias", ["", "bias"])
def test_whether_causal_and_cross_is_read_off_the_graph(source: str, bias: str) -> None:
    text = CAUSAL % (source, source, bias)
    imports = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>'
    model = onnx.parser.parse_model(imports + text.replace(", , , )", ")"))
    view = GraphView.of(model)
    opening = open_multi_head(view, view.nodes[-1])
    assert isinstance(opening, MultiHeadAttention)
    assert (opening.causal, opening.cross) == (bias == "bias", source == "e")


def closed(**changes: Any) -> str:
    values, _, _ = layout("past")
    for name in changes.pop("without", "").split():
        values.pop(name)
    model, _ = node_model(OP, SLOTS, values, **{"num_heads": H, **changes})
    return reason_closed(model, open_multi_head)


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("attribute 'softcap'", {"softcap": 3.0}),
        ("no 'num_heads'", {"num_heads": 0}),
        ("value 2 for 'unidirectional'", {"unidirectional": 2}),
        ("opset 9", {"opset": 9}),
        ("lacks its input 'query'", {"without": "query"}),
        ("lacks its input 'key'", {"without": "key"}),
        ("lacks its input 'value'", {"without": "value"}),
        ("only one of past_key and past_value", {"without": "past_value"}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_closed_with_the_reason(reason: str, changes: dict[str, Any]) -> None:
    assert reason in closed(**changes)


@pytest.mark.parametrize(
    ("opaque", "reason"), [("key value", "a key of a rank"), ("key_padding_mask", "a key_padding")]
)
def test_closed_where_a_rank_is_unknown(opaque: str, reason: str) -> None:
    model, _ = case("self", "keys")
    for value in model.graph.input:
        if value.name in opaque.split():
            value.type.tensor_type.ClearField("shape")
    assert reason in reason_closed(model, open_multi_head)

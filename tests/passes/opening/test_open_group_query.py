"""`GroupQueryAttention`, opened, against ONNX Runtime's own kernel.

Invariants: the same output in every phase of decoding, with every input and attribute; the map is
the one that the kernel gives out; sampled rows are rows of the map; what cannot be opened says why.
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper

from atpatch_onnx.passes.graph_view import GraphView
from atpatch_onnx.passes.opening.group_query import GroupQueryAttention, open_group_query
from atpatch_onnx.passes.opening.group_query_limits import SLOTS

from group_query_cases import CHOSEN, HALF, LAYOUTS, OPTIONS, PHASES, WITHOUT_PRESENT, Case
from hosts import run_model
from opened import deviation, opened_model, probabilities_model, reason_closed


@pytest.mark.parametrize("case", [*LAYOUTS, *CHOSEN, *HALF, *WITHOUT_PRESENT], ids=str)
def test_opened_computes_what_the_kernel_does(case: Case) -> None:
    model, feeds = case.model(), case.feeds()
    wanted = run_model(model, feeds)["output"]
    found = run_model(opened_model(model, open_group_query), feeds)["output"]
    deviation(found[case.defined], wanted[case.defined], case.tolerance)


@pytest.mark.parametrize("case", [*LAYOUTS[::3], *CHOSEN[::2], *HALF[::5]], ids=str)
def test_the_map_is_the_one_that_the_kernel_gives_out(case: Case) -> None:
    model, feeds = replace(case, made=4).having(qk_output=2).model(), case.feeds()
    wanted = run_model(model, feeds)["output_qk"]
    found = run_model(probabilities_model(model, open_group_query), feeds)["probabilities"]
    # The kernel leaves columns beyond the end of a sample as they were in memory.
    inside = (np.arange(case.total) < feeds["seqlens_k"][:, None] + 1)[:, None, None]
    rows = np.broadcast_to(case.defined[:, None], wanted.shape[:3])
    deviation(found[rows], np.where(inside, wanted, 0)[rows], case.tolerance)
    assert (found[(inside & (wanted == 0)) | ~inside] == 0).all()


@pytest.mark.parametrize(
    ("case", "rows"),
    [
        *((case, 3) for case in [*CHOSEN[1::5], *WITHOUT_PRESENT[::4], *HALF[::9]]),
        *product([*PHASES.values(), CHOSEN[15]], [1, 2, 8]),
    ],
    ids=str,
)
def test_sampled_rows_are_rows_of_the_map(case: Case, rows: int) -> None:
    model, feeds = case.model(), case.feeds()
    whole = run_model(probabilities_model(model, open_group_query), feeds)["probabilities"]
    found = run_model(opened_model(model, open_group_query, rows), feeds)
    indices = np.arange(rows) * (case.queries - 1) // max(rows - 1, 1)
    deviation(found["sampled"], whole[:, :, indices], case.tolerance / 10)
    wanted = run_model(model, feeds)["output"]
    deviation(found["output"][case.defined], wanted[case.defined], case.tolerance)


@pytest.mark.parametrize("hidden", [-np.inf, np.finfo(np.float32).min])
def test_rows_that_a_bias_hides_are_zero_in_the_tiled_kernel(hidden: float) -> None:
    case = Case(bias=(2, 4))
    feeds = case.feeds()
    feeds["attention_bias"][1, 2, 3] = hidden
    opened = opened_model(case.model(), open_group_query)
    wanted, found = run_model(case.model(), feeds), run_model(opened, feeds)
    assert (found["output"].reshape(2, 5, 4, -1)[1, 3, 2] == 0).all()
    deviation(found["output"], wanted["output"], 1e-5)


@pytest.mark.parametrize(
    "case",
    [Case(bias=(2, 4)).having(softcap=2.0), Case(bias=(2, 4), made=4).having(qk_output=2)],
    ids=str,
)
def test_rows_that_a_bias_hides_are_means_in_the_other_kernel(case: Case) -> None:
    feeds = case.feeds()
    feeds["attention_bias"][1, 2, 3] = np.finfo(np.float32).min
    opened = opened_model(case.model(), open_group_query)
    wanted, found = run_model(case.model(), feeds), run_model(opened, feeds)
    deviation(found["output"], wanted["output"], 1e-5)
    feeds["attention_bias"][1, 2, 3] = -np.inf  # the kernel's own is NaN
    assert np.isfinite(run_model(opened, feeds)["output"]).all()


def test_past_and_present_in_one_buffer() -> None:
    case = replace(PHASES["next token in a buffer, ragged"], rotated=32)
    model, feeds = case.model(), case.feeds()
    wanted = run_model(model, feeds)
    content = opened_model(model, open_group_query).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    make = onnxruntime.OrtValue.ortvalue_from_numpy
    shared = {name: make(feeds[f"past_{name}"].copy()) for name in ("key", "value")}
    for name, value in feeds.items():
        if not name.startswith("past"):
            binding.bind_cpu_input(name, value)
    for name, buffer in shared.items():
        binding.bind_ortvalue_input(f"past_{name}", buffer)
        binding.bind_ortvalue_output(f"present_{name}", buffer)
    binding.bind_output("output")
    session.run_with_iobinding(binding)
    key, _, output = binding.get_outputs()
    assert key.data_ptr() == shared["key"].data_ptr()
    assert np.array_equal(shared["key"].numpy()[:, :, :3], wanted["present_key"][:, :, :3])
    assert (shared["key"].numpy()[:, :, 3:] != wanted["present_key"][:, :, 3:]).any()
    deviation(output.numpy(), wanted["output"], 1e-5)


@pytest.mark.parametrize("queries", [1, 5])
def test_keys_of_another_layer_in_the_past(queries: int) -> None:
    case = Case(queries=queries, past=7, total=5, rotated=32)
    model, feeds = case.model(), case.feeds()
    for name, value in (("key", model.graph.input[1]), ("value", model.graph.input[2])):
        feeds[name] = feeds[name][:, :0]
        value.type.tensor_type.shape.dim[1].dim_value = 0
    found = run_model(opened_model(model, open_group_query), feeds)
    deviation(found["output"], run_model(model, feeds)["output"], 1e-5)


@pytest.mark.parametrize("case", WITHOUT_PRESENT[:4:3], ids=str)
def test_normalised_queries_and_keys(case: Case) -> None:
    """The CPU kernel knows no norm weights: it is given what they make."""
    model, feeds = case.having(qk_norm_epsilon=1e-3).model(), case.feeds()
    rng = np.random.default_rng(0)
    weights = {f"{n}_norm_weight": rng.standard_normal(32).astype(np.float32) for n in "qk"}
    node = model.graph.node[0]
    node.input.extend([""] * (len(SLOTS) - 2 - len(node.input)) + list(weights))
    model.graph.input.extend(
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [32]) for n in weights
    )
    normalised = dict(feeds)
    for name in ("query", "key"):
        heads = feeds[name].reshape(2, 5, -1, 32)
        root = np.sqrt(np.square(heads).mean(-1, keepdims=True) + 1e-3)
        weight = weights[f"{name[0]}_norm_weight"]
        normalised[name] = (heads / root * weight).reshape(feeds[name].shape)
    wanted = run_model(case.model(), normalised)["output"]
    found = run_model(opened_model(model, open_group_query), feeds | weights)["output"]
    deviation(found, wanted, 1e-5)


@pytest.mark.parametrize("kind", [TensorProto.BFLOAT16, TensorProto.FLOAT16])
def test_narrow_types_reach_every_node(kind: int) -> None:
    """ONNX Runtime's CPU provider runs no bfloat16: the types are checked as a model's."""
    model = OPTIONS["all"](PHASES["next token in a buffer"]).model()
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = kind
    opened = opened_model(model, open_group_query)
    probabilities = probabilities_model(model, open_group_query)
    for made in (opened, probabilities):
        made.graph.node.remove(next(n for n in made.graph.node if n.domain))
        for name in ("present_key", "present_value"):
            made.graph.input.append(helper.make_tensor_value_info(name, kind, [2, 2, 9, 32]))
        kept = [o for o in made.graph.output if o.name in ("output", "probabilities")]
        del made.graph.output[:]
        made.graph.output.extend(kept)
        onnx.checker.check_model(made, full_check=True)


def test_a_node_in_a_branch_takes_its_type_from_the_main_graph() -> None:
    model = Case(made=1).model()
    node = model.graph.node.pop()
    branch = helper.make_graph([node], "branch", [], [onnx.ValueInfoProto(name="output")])
    choice = helper.make_node("If", ["choice"], ["y"], "choose", then_branch=branch)
    model.graph.node.append(choice)
    (view,) = GraphView.of(model).nested()
    opening = open_group_query(view, view.nodes[0])
    assert isinstance(opening, GroupQueryAttention)
    assert opening.elem_type == TensorProto.FLOAT


def test_shape_says_what_the_graph_does() -> None:
    model = PHASES["prompt"].model()
    opening = open_group_query(GraphView.of(model), model.graph.node[0])
    assert isinstance(opening, GroupQueryAttention)
    assert opening.shape == (2, 4, 5, None)


def without(model: ModelProto, name: str) -> ModelProto:
    node = model.graph.node[0]
    node.input[:] = ["" if i == name else i for i in node.input]
    return model


CACHE = PHASES["next token in a buffer"]
CLOSED = {
    "has the attribute 'mask_filter_value'": Case().having(mask_filter_value=-1.0).model(),
    "has do_rotary = 2": Case().having(do_rotary=2).model(),
    "has smooth_softmax = 3": Case().having(smooth_softmax=3).model(),
    "has num_heads 4, which is no multiple of its kv_num_heads 3": Case(groups=3).model(),
    "has local_window_size 0": Case().having(local_window_size=0).model(),
    "but is not causal": Case().having(local_window_size=2, causal=0).model(),
    "quantised cache .k_quant_type PER_TENSOR.": CACHE.having(k_quant_type="PER_TENSOR").model(),
    "cache of 4 bits": CACHE.having(kv_cache_bit_width=4).model(),
    "sliding_window_cache": CACHE.having(sliding_window_cache=1, local_window_size=9).model(),
    "gives back no present ones": replace(CACHE, made=1).model(),
    "lacks its input value": without(Case().model(), "value"),
    "lacks its input cos_cache": without(Case(rotated=32).model(), "cos_cache"),
    "lacks its input past_value": without(CACHE.model(), "past_value"),
}


@pytest.mark.parametrize("reason", CLOSED)
def test_closed_with_the_reason(reason: str) -> None:
    assert re.search(reason, reason_closed(CLOSED[reason], open_group_query))


def test_closed_in_an_old_opset() -> None:
    model = Case().model()
    model.opset_import[0].version = 11
    assert "opset 11" in reason_closed(model, open_group_query)


def test_closed_where_the_type_is_unknown() -> None:
    model = Case(made=1).model()
    model.graph.node[0].input[:3] = ["q", "", ""]
    model.graph.node.insert(0, helper.make_node("Opaque", ["query"], ["q"], domain="other"))
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT8
    del model.graph.input[1:3]
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.UNDEFINED
    assert "element type" in reason_closed(model, open_group_query)

"""ONNX `Attention` opened is `Attention` fused: ONNX Runtime's kernel over a grid of everything it
takes, the definition in float64 for what it does not take, and ONNX's own test cases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx.reference
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from atpatch_onnx.passes.graph_view import GraphView
from atpatch_onnx.passes.locate import locate
from atpatch_onnx.passes.opening.attention import Attention, open_attention
from atpatch_onnx.runtime import Arrays

from attention_cases import ATOL, BEYOND, GRID, Case, name_of, reference, without_cache
from hosts import TYPES, run_model
from opened import compare, deviation, opened_model, opening_of, probabilities_model, reason_closed


def probabilities(model: ModelProto, feeds: Arrays, rows: int | None = None) -> NDArray[Any]:
    opened = probabilities_model(model, open_attention, rows)
    return run_model(opened, feeds)["probabilities"]


@pytest.mark.parametrize("case", GRID, ids=name_of)
def test_opened_is_fused(case: Case) -> None:
    model = case.model()
    compare(model, opened_model(model, open_attention), case.feeds(), ATOL[case.dtype])


@pytest.mark.parametrize("case", [c for c in GRID if c.rank == 4][::3], ids=name_of)
def test_probabilities_are_the_kernels(case: Case) -> None:
    """With the identity as V, the operator's output is its probabilities."""
    case = replace(case, value_size=case.total, qk_mode=None)
    model, feeds = case.model(), case.feeds()
    eye = np.tile(np.eye(case.total, dtype=TYPES[case.dtype]), (2, case.heads[1], 1, 1))
    feeds["v"] = np.ascontiguousarray(eye[:, :, case.past :])
    if case.past:
        feeds["past_v"] = np.ascontiguousarray(eye[:, :, : case.past])
    deviation(probabilities(model, feeds), run_model(model, feeds)["y"], ATOL[case.dtype])


@pytest.mark.parametrize("case", [c for c in GRID if c.qk_mode == 3], ids=name_of)
def test_probabilities_are_the_further_output(case: Case) -> None:
    model, feeds = case.model(), case.feeds()
    deviation(probabilities(model, feeds), run_model(model, feeds)["qk"], ATOL[case.dtype])


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(
    "case", [c for c in GRID if c.dtype == "float"][::8] + BEYOND[::3], ids=name_of
)
def test_rows_are_rows_of_the_whole_map(case: Case, rows: int) -> None:
    model, feeds = without_cache(case.model()), case.feeds()
    taken = np.arange(rows) * (case.queries - 1) // max(rows - 1, 1)
    wanted = probabilities(model, feeds)[:, :, taken]
    deviation(probabilities(model, feeds, rows), wanted, 1e-6)
    both = run_model(opened_model(model, open_attention, rows), feeds)
    deviation(both["sampled"], wanted, 1e-6)


@pytest.mark.parametrize("case", BEYOND, ids=name_of)
def test_opened_is_the_definition(case: Case) -> None:
    model, feeds = without_cache(case.model()), case.feeds()
    found = run_model(opened_model(model, open_attention), feeds)["y"]
    np.testing.assert_allclose(found, reference(case, feeds), atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", GRID[::9], ids=name_of)
def test_float64_is_the_definition(case: Case) -> None:
    """ONNX Runtime has no float64 kernel, and takes scales into products as float32; a cache that
    the node does not give is joined here."""
    case = replace(case, dtype="double")
    model, feeds = without_cache(case.model()), case.feeds()
    found = run_model(opened_model(model, open_attention), feeds)["y"]
    np.testing.assert_allclose(found, reference(case, feeds), atol=1e-7, rtol=0)


def test_values_of_another_type() -> None:
    case = Case(past=2)
    model, feeds = without_cache(case.model()), case.feeds()
    for value in model.graph.input:
        if value.name in ("v", "past_v"):
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
            feeds[value.name] = feeds[value.name].astype(np.float64)
    found = run_model(opened_model(model, open_attention), feeds)["y"]
    np.testing.assert_allclose(found, reference(case, feeds), atol=1e-6, rtol=0)


@pytest.mark.parametrize("mask", ["bool 4", "min 3"])
def test_bfloat16_can_be_expressed(mask: str) -> None:
    """The types of all new values are inferred, and the definition in them is close."""
    case = Case(opset=24, mask=mask, nonpad=(5, 3), attributes=(("is_causal", 1), ("softcap", 2)))
    model, feeds = case.model(), case.feeds()
    wanted = reference(case, feeds)
    narrow = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)
    if "min" in mask:
        feeds["mask"] = np.maximum(feeds["mask"], -np.float32(float.fromhex("0x1.fep127")))
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.BFLOAT16
            if value.name in feeds:
                feeds[value.name] = feeds[value.name].astype(narrow)
    opened = opened_model(model, open_attention)
    onnx.shape_inference.infer_shapes(opened, check_type=True, strict_mode=True)
    with np.errstate(invalid="ignore"):  # its softmax of rows that see nothing
        (found,) = onnx.reference.ReferenceEvaluator(opened).run(["y"], feeds)
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, atol=5e-2, rtol=5e-2)


def test_unknown_ranks_and_shapes() -> None:
    """Heads known from a Reshape, the mask's rank and all sizes only at run time."""
    model = onnx.parser.parse_model("""
        <ir_version: 11, opset_import: ["" : 24]>
        host (float[N, L, 8] x, bool[N, 1, L, L] m, int64[R] like) => (float[N, 4, L, 2] y)
        <int64[4] split = {0, 0, 4, 2}> {
            apart = Reshape (x, split)
            q = Transpose <perm = [0, 2, 1, 3]> (apart)
            mask = Reshape (m, like)
            y = Attention <is_causal = 1> (q, q, q, mask)
        }""")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 8)).astype(np.float32)
    for shape in ((2, 1, 5, 5), (1, 5, 5), (5, 5)):
        mask = rng.random((shape[0] if len(shape) == 4 else 1, 1, 5, 5)) < 0.6
        feeds: Arrays = {"x": x, "m": mask, "like": np.array(shape)}
        compare(model, opened_model(model, open_attention), feeds, 1e-5)
        compare(model, opened_model(model, open_attention, 3), feeds, 1e-5)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_key_heads_known_only_at_run_time(groups: int) -> None:
    case = Case(heads=(4, groups), past=2, attributes=(("is_causal", 1),))
    model, feeds = case.model(), case.feeds()
    for value in model.graph.input:
        if value.name in "kv":
            value.type.tensor_type.shape.dim[1].dim_param = "G"
    compare(model, opened_model(model, open_attention), feeds, 1e-5)


def test_inside_a_branch() -> None:
    """Types and shapes of captured values come from the enclosing graph."""
    model = onnx.parser.parse_model("""
        <ir_version: 11, opset_import: ["" : 23]>
        host (float16[N, 4, L, 8] q, float16[N, 2, L, 8] k, bool c) => (float16[N, 4, L, 8] y) {
            y = If (c) <
                then_branch = a () => (float16[N, 4, L, 8] ya) { ya = Attention (q, k, k) },
                else_branch = b () => (float16[N, 4, L, 8] yb) { yb = Identity (q) }
            >
        }""")
    view = next(v for v in GraphView.of(model).nested() if v.nodes[0].op_type == "Attention")
    found = open_attention(view, view.nodes[0])
    assert isinstance(found, Attention)
    assert (found.elem_type, found.heads, found.kv_heads) == (TensorProto.FLOAT16, 4, 2)


def test_what_is_known_of_a_site() -> None:
    case = Case(fixed=True, past=2, attributes=(("is_causal", 1),))
    opening = opening_of(case.model(), open_attention)
    assert opening.shape == (2, 4, 3, 7)
    assert opening.causal
    assert opening.cross
    assert not opening_of(Case().model(), open_attention).causal


CLOSED: list[tuple[dict[str, Any], str]] = [
    ({"warp": 3}, "'warp'"),
    ({"is_causal": 2}, "is_causal=2"),
    ({"qk_matmul_output_mode": 4}, "qk_matmul_output_mode=4"),
    ({"softmax_precision": 7}, "softmax_precision=7"),
    ({"left_window_size": -3}, "left_window_size=-3"),
    ({"scale": 0.0}, "scale=0"),
    ({"q_num_heads": 4, "kv_num_heads": 3}, "cannot share"),
]


@pytest.mark.parametrize(("given", "named"), CLOSED, ids=lambda value: str(value))
def test_what_has_no_meaning_stays_closed(given: dict[str, Any], named: str) -> None:
    model = Case(attributes=tuple(given.items())).model()
    assert named in reason_closed(model, open_attention)


def test_caches_of_two_kinds_stay_closed() -> None:
    both = Case(opset=24, past=2, nonpad=(4, 5)).model()
    assert "nonpad_kv_seqlen" in reason_closed(both, open_attention)
    half = Case(past=2).model()
    half.graph.node[0].input.pop()
    assert "only one of" in reason_closed(half, open_attention)


def test_unknown_heads_and_types_stay_closed() -> None:
    model = Case().model()
    del model.graph.input[0].type.tensor_type.shape.dim[1]
    model.graph.input[0].type.tensor_type.shape.dim.add().dim_param = "more"
    assert "number of heads" in reason_closed(model, open_attention)
    text = """<ir_version: 11, opset_import: ["" : 23, "odd" : 1]>
        host (float[N, 4, L, 8] x) => (y) { q = odd.Op (x) k = If (q) y = Attention (k, k, k) }"""
    assert "element type" in reason_closed(onnx.parser.parse_model(text), open_attention)


def test_every_case_of_onnx(zoo: Path) -> None:
    """With their own inputs and outputs; those that come without, against the kernel."""
    paths = [p for p in zoo.rglob("test_attention_*/model.onnx") if "_expanded" not in str(p)]
    assert len(paths) > 50
    for path in paths:
        model = onnx.load(path)
        opened = opened_model(model, open_attention)
        feeds, wanted = stored(path.parent / "test_data_set_0", model)
        found = run_model(opened, feeds)
        for name, value in (wanted or run_model(model, feeds)).items():
            deviation(found[name], value, 2e-3 if value.dtype == np.float16 else 1e-5)


def test_every_expanded_case_of_onnx_is_a_site(zoo: Path) -> None:
    paths = [p for p in zoo.rglob("test_attention_*/model.onnx") if "_expanded" in str(p)]
    assert len(paths) > 20
    for path in paths:
        (site,) = locate(onnx.load(path)).sites
        assert site.rank == 4, path


def stored(folder: Path, model: ModelProto) -> tuple[Arrays, Arrays]:
    """The inputs and outputs in `folder`; random inputs and no outputs where there are none."""

    def read(kind: str, names: list[str]) -> Arrays:
        files = [folder / f"{kind}_{i}.pb" for i in range(len(names))]
        tensors = [TensorProto.FromString(file.read_bytes()) for file in files]
        return {n: numpy_helper.to_array(t) for n, t in zip(names, tensors, strict=True)}

    graph = model.graph
    if folder.exists():
        return read("input", [i.name for i in graph.input]), read(
            "output", [o.name for o in graph.output]
        )
    rng = np.random.default_rng(0)
    feeds: Arrays = {}
    for value in graph.input:
        tensor = value.type.tensor_type
        shape = [d.dim_value for d in tensor.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        feeds[value.name] = rng.standard_normal(shape).astype(dtype)
    return feeds, {}

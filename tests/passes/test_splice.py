"""Invariants of the splice: what is not flagged keeps its bits, whoever else is in the batch; what
is flagged is redistributed as the reference says; switches and telemetry do what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import ModelProto, TensorProto

from atpatch_onnx.detector import Detector, load_detector
from atpatch_onnx.errors import InputError, RefusedError
from atpatch_onnx.passes.graph_view import GraphView
from atpatch_onnx.passes.locate import locate
from atpatch_onnx.passes.outcome import Patched, Skipped
from atpatch_onnx.passes.probe import add_output
from atpatch_onnx.passes.redistribute import Redistribution
from atpatch_onnx.passes.splice import Splice, Strategy, Treatment

from hosts import (
    COLUMN_MEAN,
    COLUMN_MEAN_18,
    assert_patch,
    attention,
    detector,
    edited,
    model_file,
    random_feeds,
    reference,
    run,
    spliced,
)

IN_FLOW = (Strategy.GUARD, Strategy.SELECT)
"""The strategies that patch P V where it is; `rerun` has tests of its own."""


def load(model: ModelProto, tmp_path: Path, opset: int = 17) -> Detector:
    path = tmp_path / "det.onnx"
    onnx.save(model, path)
    return load_detector(path, opset)


def everywhere(
    treatment: Treatment, names: tuple[str, ...] = ("attention.0", "attention.1"), **options: object
) -> Splice:
    return Splice(dict.fromkeys(names, treatment), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", IN_FLOW)
@pytest.mark.parametrize("mode", [Redistribution.UNIFORM, Redistribution.PRUNE])
@pytest.mark.parametrize("dtype", ["float", "float16", "double"])
@pytest.mark.parametrize("opset", [9, 12, 13, 17, 18, 23])
def test_nothing_flagged_changes_nothing(
    opset: int, dtype: str, mode: Redistribution, strategy: Strategy, tmp_path: Path
) -> None:
    body = COLUMN_MEAN if opset < 18 else COLUMN_MEAN_18
    never = load(detector(body, threshold=1.0, opset=opset), tmp_path, opset)
    host = model_file(attention(opset, dtype))
    after, _ = spliced(host, everywhere(Treatment(mode, never), strategy=strategy))
    assert_patch(host, after, rewired=2)
    feeds = random_feeds(dtype)
    before = run(host, feeds)["y"]
    assert np.array_equal(before, run(after, feeds)["y"])


@pytest.mark.parametrize("strategy", IN_FLOW)
@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_one_flagged_sample_changes_no_other(
    dtype: str, strategy: Strategy, tmp_path: Path
) -> None:
    """Sample 1 of 3 attends to one key alone; only there a column's mean passes 0.9."""
    host = model_file(attention(17, dtype))
    feeds = random_feeds(dtype)
    feeds["k"][1] = -feeds["q"][1].mean(axis=1, keepdims=True) * 0
    feeds["mask"][1, ..., :] = -8
    feeds["mask"][1, ..., 3] = 0
    found = load(detector(COLUMN_MEAN, threshold=0.9), tmp_path)
    splice = everywhere(Treatment(Redistribution.PRUNE, found), strategy=strategy, telemetry=True)
    after, _ = spliced(host, splice)
    before, result = run(host, feeds), run(after, feeds)
    flagged = result["atpatch/attention.0/flagged"]
    assert flagged[1, 0, 0].tolist() == [False, False, False, True, False, False]
    assert flagged.sum() == 1
    assert np.array_equal(before["y"][[0, 2]], result["y"][[0, 2]])
    assert not np.array_equal(before["y"][1], result["y"][1])


@pytest.mark.parametrize("strategy", IN_FLOW)
@pytest.mark.parametrize("mode", list(Redistribution))
def test_flagged_columns_are_redistributed_as_the_reference_says(
    mode: Redistribution, strategy: Strategy, tmp_path: Path
) -> None:
    """Every column above a mean of 0.2 is flagged; V is the identity, so that y is the map."""
    body = f"""{COLUMN_MEAN}
        half = Constant <value_float = 0.5> ()
        benign = Mul (anomaly, half)
    """
    found = load(detector(body, "float[B, 1, 1, K] benign", threshold=0.2), tmp_path)
    host = model_file(attention(17))
    feeds = random_feeds(length=4, seed=3)
    feeds["v"] = np.broadcast_to(np.eye(4, dtype=np.float32), feeds["v"].shape)
    names = {"attention.0": Treatment(mode, found)}
    after, result = spliced(host, Splice(names, strategy=strategy))
    assert [type(o) for o in result.outcomes] == [Patched, Skipped]
    before = edited(
        host, (add_output("p0", TensorProto.FLOAT), add_output("c0", TensorProto.FLOAT))
    )
    p = run(before, feeds)["p0"]
    anomaly = p.mean(axis=(1, 2), keepdims=True)
    benign = anomaly * 0.5 if mode is Redistribution.BENIGN else None
    wanted = reference(p, anomaly > 0.2, benign, uniform=mode is Redistribution.UNIFORM)
    file = model_file(_parsed(after.content()))
    patched = edited(file, (add_output("c0", TensorProto.FLOAT),))
    np.testing.assert_allclose(run(patched, feeds)["c0"], wanted, atol=1e-6)
    assert (anomaly > 0.2).any()


def _parsed(content: bytes) -> ModelProto:
    return ModelProto.FromString(content)


def test_the_detector_is_stored_once_and_its_weights_are_shared(tmp_path: Path) -> None:
    model = detector("anomaly = Identity (zeros)")
    model.graph.ClearField("node")
    reduce = onnx.parser.parse_graph("""
        g (float[B, H, Q, K] attention) => (float[B, 1, 1, K] anomaly) {
            rows = ReduceMean <axes = [1, 2], keepdims = 1> (attention)
            anomaly = Mul (rows, weight)
        }
    """)
    model.graph.node.extend(reduce.node)
    weight = onnx.numpy_helper.from_array(np.ones(1, np.float32), "weight")
    model.graph.initializer.append(weight)
    host = model_file(attention(17))
    treatment = Treatment(Redistribution.PRUNE, load(model, tmp_path))
    after, _ = spliced(host, everywhere(treatment))
    found = assert_patch(host, after, rewired=2)
    assert found.inserted_initializers.count("atpatch/shared/detector/weight") == 1
    readers = [
        n
        for n in _parsed(after.content()).graph.node
        if "atpatch/shared/detector/weight" in n.input
    ]
    assert len(readers) == 2


@pytest.mark.parametrize("strategy", IN_FLOW)
def test_before_ir_version_4_nothing_is_stored_beside_the_inputs(
    strategy: Strategy, tmp_path: Path
) -> None:
    old = attention(9)
    old.ir_version = 3
    host = model_file(old)
    treatment = Treatment(Redistribution.UNIFORM, load(detector(COLUMN_MEAN, opset=9), tmp_path, 9))
    after, _ = spliced(host, everywhere(treatment, strategy=strategy))
    assert not assert_patch(host, after, rewired=2).inserted_initializers
    new, _ = spliced(model_file(attention(9)), everywhere(treatment, strategy=strategy))
    assert np.array_equal(run(after, random_feeds())["y"], run(new, random_feeds())["y"])
    with pytest.raises(RefusedError, match="IR version 3"):
        spliced(host, everywhere(treatment, toggle=True))


def test_a_detector_of_another_opset_is_converted(tmp_path: Path) -> None:
    """The same numbers from a detector written five operator versions earlier."""
    host = model_file(attention(18))
    results = []
    for opset, body in ((13, COLUMN_MEAN), (18, COLUMN_MEAN_18)):
        found = load(detector(body, threshold=0.2, opset=opset), tmp_path, 18)
        after, _ = spliced(host, everywhere(Treatment(Redistribution.PRUNE, found)))
        results.append(run(after, random_feeds())["y"])
    assert np.array_equal(results[0], results[1])
    assert not np.array_equal(results[0], run(host, random_feeds())["y"])


@pytest.mark.parametrize("strategy", IN_FLOW)
def test_a_patched_site_is_not_patched_again(strategy: Strategy, tmp_path: Path) -> None:
    treatment = Treatment(Redistribution.PRUNE, load(detector(COLUMN_MEAN), tmp_path))
    after, _ = spliced(model_file(attention(17)), everywhere(treatment, strategy=strategy))
    found = locate(_parsed(after.content()))
    assert not found.sites
    assert [other.reason for other in found.refused] == ["it is patched already"] * 2


@pytest.mark.parametrize("strategy", IN_FLOW)
def test_a_quantised_product_with_v_stays_one(strategy: Strategy, tmp_path: Path) -> None:
    """ONNX Runtime computes DequantizeLinear, MatMul, QuantizeLinear in integers; a patch that
    flags nothing must leave that to it, or results move by a quantum here and there."""

    def quantised(name: str, source: str, scale: str) -> str:
        return (
            f"{name}8 = QuantizeLinear ({source}, {scale}, z) "
            f"{name} = DequantizeLinear ({name}8, {scale}, z)"
        )

    model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        host (float[B, 2, L, 16] x) => (float[B, 2, L, 16] y)
        <float s = {{0.02}}, float u = {{0.00390625}}, uint8 z = {{0}}>
        {{
            {quantised("v", "x", "s")}
            t = Transpose <perm = [0, 1, 3, 2]> (v)
            m = MatMul (v, t) {quantised("d", "m", "s")} p0 = Softmax <axis = -1> (d)
            {quantised("p", "p0", "u")} c = MatMul (p, v) {quantised("y", "c", "s")}
        }}
    """)
    host = model_file(model)
    never = load(detector(COLUMN_MEAN, threshold=1.0), tmp_path)
    after, _ = spliced(
        host,
        everywhere(
            Treatment(Redistribution.UNIFORM, never), strategy=strategy, names=("attention",)
        ),
    )
    x = np.random.default_rng(0).random((16, 2, 32, 16), np.float32) * 5
    assert np.array_equal(run(host, {"x": x})["y"], run(after, {"x": x})["y"])


def test_every_site_may_have_its_own_detector(tmp_path: Path) -> None:
    """One that flags every column and one that flags none, each with its own tensor."""
    names = {}
    for site, value in (("attention.0", "2"), ("attention.1", "0")):
        body = f"{COLUMN_MEAN.replace('anomaly', 'mean')} anomaly = Mul (mean, factor)"
        model = detector(body.replace("factor", "rows"), threshold=0.0)
        model.graph.node[-1].input[1] = "factor"
        factor = np.array([float(value)], np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(factor, "factor"))
        names[site] = Treatment(Redistribution.UNIFORM, load(model, tmp_path))
    host = model_file(attention(17))
    after, _ = spliced(host, Splice(names, telemetry=True))
    stored = assert_patch(host, after, rewired=2).inserted_initializers
    assert sum(name.endswith("/factor") for name in stored) == 2
    feeds = random_feeds()
    feeds["mask"][:] = 0
    result = run(after, feeds)
    assert result["atpatch/attention.0/flagged"].all()
    assert not result["atpatch/attention.1/flagged"].any()


def test_one_threshold_input_serves_all_sites_that_have_it(tmp_path: Path) -> None:
    found = load(detector(COLUMN_MEAN), tmp_path)
    names = {
        "attention.0": Treatment(Redistribution.PRUNE, found),
        "attention.1": Treatment(Redistribution.PRUNE, columns=(0,)),
    }
    host = model_file(attention(17))
    after, _ = spliced(host, Splice(names, toggle=True))
    assert assert_patch(host, after, rewired=2).inserted_inputs == [
        "atpatch/threshold",
        "atpatch/enabled",
    ]


def test_toggle_switches_off_and_moves_the_threshold(tmp_path: Path) -> None:
    host = model_file(attention(17))
    treatment = Treatment(
        Redistribution.PRUNE, load(detector(COLUMN_MEAN, threshold=0.1), tmp_path)
    )
    after, _ = spliced(host, everywhere(treatment, toggle=True))
    assert_patch(host, after, rewired=2)
    feeds = random_feeds()
    original = run(host, feeds)["y"]
    assert not np.array_equal(original, run(after, feeds)["y"])
    for switch in (
        {"atpatch/enabled": np.array(False)},
        {"atpatch/threshold": np.array(2.0, np.float32)},
    ):
        assert np.array_equal(original, run(after, {**feeds, **switch})["y"])


def test_layer_tells_the_sites_apart(tmp_path: Path) -> None:
    """A detector that flags column 1 at layer 0 and column 2 at layer 1."""
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        det (float[B, H, Q, K] attention, int64 layer) => (float[B, 1, 1, K] anomaly)
        <float[2, 1, 1, 1, 6] table = {0,1,0,0,0,0, 0,0,1,0,0,0}>
        {
            row = Gather <axis = 0> (table, layer)
            zero = Constant <value_float = 0.0> ()
            means = ReduceMean <axes = [1, 2], keepdims = 1> (attention)
            nothing = Mul (means, zero)
            anomaly = Add (nothing, row)
        }
    """)
    onnx.helper.set_model_props(model, {"atpatch.abi": "1", "atpatch.threshold": "0.5"})
    host = model_file(attention(17))
    treatment = Treatment(Redistribution.PRUNE, load(model, tmp_path))
    after, _ = spliced(host, everywhere(treatment, telemetry=True))
    result = run(after, random_feeds())
    for layer, column in ((0, 1), (1, 2)):
        flagged = result[f"atpatch/attention.{layer}/flagged"]
        assert np.flatnonzero(flagged.any(axis=(0, 1, 2))).tolist() == [column]


def test_further_inputs_are_bound_to_host_values(tmp_path: Path) -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        det (float[B, H, Q, K] attention, float[B, 1, 1, K] mark) => (float[B, 1, 1, K] anomaly)
        { one = Constant <value_float = 1.0> () anomaly = Add (mark, one) }
    """)
    onnx.helper.set_model_props(model, {"atpatch.abi": "1", "atpatch.threshold": "0.5"})
    treatment = Treatment(Redistribution.PRUNE, load(model, tmp_path))
    host = model_file(attention(17))
    with pytest.raises(InputError, match="--bind mark="):
        spliced(host, everywhere(treatment))
    with pytest.raises(InputError, match="computed only behind"):
        spliced(host, everywhere(treatment, bindings={"mark": "y"}))
    after, _ = spliced(host, everywhere(treatment, bindings={"mark": "mask"}, telemetry=True))
    feeds = random_feeds()
    flagged = run(after, feeds)["atpatch/attention.0/flagged"]
    assert np.array_equal(flagged, feeds["mask"] > -0.5)


@pytest.mark.parametrize(
    ("opset", "columns"), [(9, (1,)), (11, (1, -1)), (17, (0, 2)), (23, (-2,))]
)
def test_static_columns_are_always_flagged(opset: int, columns: tuple[int, ...]) -> None:
    host = model_file(attention(opset))
    treatment = Treatment(Redistribution.PRUNE, columns=columns)
    after, _ = spliced(host, everywhere(treatment, telemetry=True))
    feeds = random_feeds()
    flagged = run(after, feeds)["atpatch/attention.1/flagged"]
    wanted = np.zeros(6, bool)
    wanted[list(columns)] = True
    assert flagged.shape == (3, 1, 1, 6)
    assert (flagged == wanted).all()
    # Pruning is a -inf bias on the logits: the host itself says so.
    feeds["mask"] = feeds["mask"][:1].repeat(3, axis=0)
    hidden = {**feeds, "mask": np.where(wanted, -np.inf, feeds["mask"]).astype(np.float32)}
    np.testing.assert_allclose(run(after, feeds)["y"], run(host, hidden)["y"], atol=1e-5)


def test_a_column_outside_the_map_is_refused() -> None:
    fixed = attention(17)
    for value in fixed.graph.input:
        dims = value.type.tensor_type.shape.dim
        for place, name in enumerate("BHL" if value.name != "mask" else "B11"):
            if name != "1":
                dims[place].dim_value = {"B": 3, "H": 2, "L": 6}[name]
    fixed.graph.input[3].type.tensor_type.shape.dim[3].dim_value = 6
    with pytest.raises(InputError, match="columns 0 to 5"):
        spliced(model_file(fixed), everywhere(Treatment(Redistribution.PRUNE, columns=(6,))))


@pytest.mark.parametrize("strategy", IN_FLOW)
@pytest.mark.parametrize(
    ("rank", "shape", "key"),
    [
        (2, "[6, 4]", "[4, 6]"),
        (3, "[6, 6, 4]", "[6, 4, 6]"),
        (5, "[3, 1, 2, 6, 4]", "[3, 1, 2, 4, 6]"),
    ],
)
def test_other_ranks_are_viewed_as_four(
    rank: int, shape: str, key: str, strategy: Strategy
) -> None:
    """Pruning column 0 of a map of any rank is the host with that key masked."""
    model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        host (float{shape} q, float{key} k, float{shape} v, float[1, 6] mask) => (float{shape} y) {{
            s = MatMul (q, k)
            t = Add (s, mask)
            p = Softmax <axis = -1> (t)
            y = MatMul (p, v)
        }}
    """)
    host = model_file(model)
    sites = locate(host.skeleton).sites
    assert [site.rank for site in sites] == [rank]
    splice = Splice({sites[0].name: Treatment(Redistribution.PRUNE, columns=(0,))}, strategy)
    after, _ = spliced(host, splice)
    rng = np.random.default_rng(0)
    feeds = {
        v.name: rng.standard_normal([d.dim_value for d in v.type.tensor_type.shape.dim], np.float32)
        for v in model.graph.input
    }
    hidden = {**feeds, "mask": feeds["mask"].copy()}
    hidden["mask"][:, 0] = -np.inf
    np.testing.assert_allclose(run(after, feeds)["y"], run(host, hidden)["y"], atol=1e-5)


def test_bfloat16_hosts_pass_the_checker_at_any_opset() -> None:
    """No CPU kernel multiplies bfloat16: types and structure are all that can be checked."""
    for opset in (13, 17, 18):
        host = model_file(attention(opset, "bfloat16"))
        for strategy in IN_FLOW:
            treatment = Treatment(Redistribution.UNIFORM, columns=(1,))
            after, _ = spliced(host, everywhere(treatment, strategy=strategy))
            onnx.checker.check_model(after.content(), full_check=True)
            types = GraphView.of(_parsed(after.content())).types
            assert types["y"].elem_type == TensorProto.BFLOAT16


def test_select_has_no_control_flow(tmp_path: Path) -> None:
    host = model_file(attention(17))
    treatment = Treatment(Redistribution.UNIFORM, load(detector(COLUMN_MEAN), tmp_path))
    for strategy in IN_FLOW:
        after, _ = spliced(host, everywhere(treatment, strategy=strategy))
        ops = [node.op_type for node in _parsed(after.content()).graph.node]
        assert ops.count("If") == (2 if strategy is Strategy.GUARD else 0)

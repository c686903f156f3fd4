"""Detectors that look at several sites and decide once: observed, applied in flow, run again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from atpatch_onnx.certificate import certify
from atpatch_onnx.detector import Detector, load_detector
from atpatch_onnx.errors import InputError, RefusedError
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.passes.graph_view import GraphView
from atpatch_onnx.passes.locate import locate
from atpatch_onnx.passes.observe import Observe
from atpatch_onnx.passes.redistribute import Redistribution
from atpatch_onnx.passes.splice import Splice, Strategy, Treatment
from atpatch_onnx.passes.switches import FLAGGED, REMEMBERED
from atpatch_onnx.patching import Patch, apply, revert

from hosts import Floats, model_file, reference, run, spliced

HEADS, KEYS, DIM = 2, 5, 3
SCALE = 0.2
SITES = ("attention.0", "attention.1", "attention.2")
FLOW = [Strategy.GUARD, Strategy.SELECT]


def host(opset: int = 17, site: str = "") -> ModelProto:
    """Three sites in a row that attend to the same keys, and what the middle one has put out."""
    fused = f"Attention <scale = {SCALE}>" if site == "fused" else ""
    layers = ""
    for i, value in enumerate("xhg"):
        if fused:
            layers += f"c{i} = {fused} ({value}, {value}, {value})\n"
        else:
            layers += f"""t{i} = Transpose <perm = [0, 1, 3, 2]> ({value})
                r{i} = MatMul ({value}, t{i})
                s{i} = Mul (r{i}, scale)
                p{i} = Softmax <axis = -1> (s{i})
                c{i} = MatMul (p{i}, {value})
                """
        layers += f"{'hgz'[i]} = Add ({value}, c{i})\n"
    return onnx.parser.parse_model(f"""
        <ir_version: {8 if opset < 21 else 10}, opset_import: ["" : {opset}]>
        host (float[B, 2, K, 3] x, bool[B, K] mask) => (float[B, 2, K, 3] y, float[B, 2, K, 3] g)
        <float scale = {{{SCALE}}}>
        {{ {layers} y = Neg (z) }}
    """)


def layers_of(
    x: NDArray[np.generic], changed: dict[int, NDArray[np.bool_]] | None = None
) -> tuple[list[NDArray[np.float64]], dict[str, NDArray[np.float64]]]:
    """The maps and outputs of the host in float64; changed: pruned columns by site."""
    h, maps, made = x.astype(np.float64), [], []
    for i in range(3):
        s = h @ h.swapaxes(-1, -2) * SCALE
        e = np.exp(s - s.max(axis=-1, keepdims=True))
        maps.append(e / e.sum(axis=-1, keepdims=True))
        p = maps[-1]
        if changed and i in changed:
            p = reference(p, changed[i], None)
        h = h + p @ h
        made.append(h)
    return maps, {"y": -made[2], "g": made[1]}


def detector(
    observed: Sequence[int], applied: Sequence[int], threshold: float = 0.3, masked: bool = False
) -> ModelProto:
    """The largest column mean over the observed sites; bound: times a mask of the host."""
    names = [f"attention.{SITES[i]}" for i in observed]
    nodes = [
        helper.make_node("ReduceMean", [name], [f"m{i}"], axes=[1, 2], keepdims=1)
        for i, name in enumerate(names)
    ]
    joined = [f"m{i}" for i in range(len(names))]
    nodes.append(helper.make_node("Max", joined, ["all" if masked else "anomaly"]))
    info = helper.make_tensor_value_info
    inputs = [info(name, TensorProto.FLOAT, ["B", "H", "Q", "K"]) for name in names]
    if masked:
        axes = helper.make_tensor("axes", TensorProto.INT64, [2], [1, 2])
        nodes += [
            helper.make_node("Constant", [], ["axes"], value=axes),
            helper.make_node("Cast", ["visual"], ["ones"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["ones", "axes"], ["wide"]),
            helper.make_node("Mul", ["all", "wide"], ["anomaly"]),
        ]
        inputs.append(info("visual", TensorProto.BOOL, ["B", "K"]))
    output = info("anomaly", TensorProto.FLOAT, ["B", 1, 1, "K"])
    graph = helper.make_graph(nodes, "det", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return with_metadata(model, applied, threshold)


def with_metadata(model: ModelProto, applied: Sequence[int], threshold: float = 0.5) -> ModelProto:
    named = ", ".join(f'"{SITES[i]}"' for i in applied)
    about = {"abi": "1", "threshold": str(threshold), "scope": "model", "apply": f"[{named}]"}
    helper.set_model_props(model, {f"atpatch.{key}": value for key, value in about.items()})
    return model


def loaded(model: ModelProto, folder: Path, opset: int = 17) -> Detector:
    onnx.save(model, folder / "det.onnx")
    return load_detector(folder / "det.onnx", opset)


def splice(found: Detector, strategy: Strategy, **options: object) -> Splice:
    mode = Redistribution.BENIGN if found.gives_benign else Redistribution.PRUNE
    treatments = dict.fromkeys(found.sites, Treatment(mode, found))
    return Splice(treatments, strategy, **options)  # type: ignore[arg-type]


def data(count: int = 6, loud: Sequence[int] = (1, 4)) -> Floats:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((count, HEADS, KEYS, DIM)).astype(np.float32) * 0.3
    x[list(loud), :, 3] = 2.3
    x[list(loud), :, :3, 0] += 0.8
    x[list(loud), :, 4, 0] += 0.8
    return {"x": x, "mask": np.ones((count, KEYS), bool)}


def flagged_by(x: NDArray[np.generic], observed: Sequence[int]) -> NDArray[np.bool_]:
    maps, _ = layers_of(x)
    means = np.max([maps[i].mean(axis=(1, 2)) for i in observed], axis=0)
    return np.asarray(means > 0.3)[:, None, None]


@pytest.mark.parametrize("strategy", FLOW)
@pytest.mark.parametrize(
    ("observed", "applied"), [([0, 1], [1, 2]), ([0], [0, 1, 2]), ([0, 2], [2])]
)
def test_what_several_sites_say_together_is_applied_at_later_ones(
    observed: list[int], applied: list[int], strategy: Strategy, tmp_path: Path
) -> None:
    file = model_file(host())
    found = loaded(detector(observed, applied), tmp_path)
    rewritten, result = spliced(file, splice(found, strategy, telemetry=True))
    assert [outcome.site for outcome in result.patched] == [SITES[i] for i in applied]
    feeds = data()
    flagged = flagged_by(feeds["x"], observed)
    assert sorted(set(np.nonzero(flagged)[0])) == [1, 4]
    before, after = run(file, feeds), run(rewritten, feeds)
    _, wanted = layers_of(feeds["x"], dict.fromkeys(applied, flagged))
    quiet = [0, 2, 3, 5]
    for name in before:
        np.testing.assert_allclose(after[name], wanted[name], atol=1e-5)
        np.testing.assert_array_equal(after[name][quiet], before[name][quiet])
    for site in applied:
        np.testing.assert_array_equal(after[f"atpatch/{SITES[site]}/flagged"], flagged)
    for i in range(6):
        one = run(rewritten, {name: value[i : i + 1] for name, value in feeds.items()})
        np.testing.assert_allclose(one["y"][0], after["y"][i], atol=1e-6)


@pytest.mark.parametrize("form", ["", "fused"])
def test_deciding_first_prunes_from_the_first_site_on(form: str, tmp_path: Path) -> None:
    """Also the output in the middle, as a cache would be."""
    opset = 23 if form else 17
    file = model_file(host(opset, form))
    found = loaded(detector([0, 1, 2], [0, 1, 2]), tmp_path, opset)
    names = [site.name for site in locate(file.skeleton).sites]
    assert names == list(SITES)
    rewritten, result = spliced(file, splice(found, Strategy.RERUN))
    assert [outcome.site for outcome in result.patched] == names
    feeds = data()
    flagged = flagged_by(feeds["x"], [0, 1, 2])
    _, wanted = layers_of(feeds["x"], dict.fromkeys(range(3), flagged))
    before, after = run(file, feeds), run(rewritten, feeds)
    quiet = ~flagged.any(axis=(1, 2, 3))
    for name in before:
        np.testing.assert_allclose(after[name], wanted[name], atol=1e-5)
        np.testing.assert_array_equal(after[name][quiet], before[name][quiet])
    patched = ModelFile.from_bytes(rewritten.content(), file.path)
    certify(file, patched)
    assert revert(patched).content() == file.buffer


def test_run_again_changes_only_where_the_decision_is_applied(tmp_path: Path) -> None:
    file = model_file(host())
    found = loaded(detector([2], [0]), tmp_path)
    rewritten, _ = spliced(file, splice(found, Strategy.RERUN))
    feeds = data()
    flagged = flagged_by(feeds["x"], [2])
    _, wanted = layers_of(feeds["x"], {0: flagged})
    np.testing.assert_allclose(run(rewritten, feeds)["y"], wanted["y"], atol=1e-5)


HEADWISE = """
    <ir_version: 8, opset_import: ["" : 17]>
    det (float[B, 2, Q, K] attention.attention.0, float[B, 2, Q, K] attention.attention.1)
        => (float[B, 2, 1, K] anomaly.attention.1, float[B, 2, 1, K] anomaly.attention.2,
            float[B, 1, 1, K] benign)
    <float[1, 2, 1, 1] second = {0, 1}, float[1, 2, 1, 1] first = {1, 0}, float fifth = {0.2}>
    {
        m0 = ReduceMax <axes = [1, 2, 3]> (attention.attention.0)
        m1 = ReduceMax <axes = [1, 2, 3]> (attention.attention.1)
        m = Max (m0, m1)
        row = ReduceMean <axes = [1, 2]> (attention.attention.0)
        ones = Div (row, row)
        wide = Mul (m, ones)
        anomaly.attention.1 = Mul (wide, second)
        anomaly.attention.2 = Mul (wide, first)
        benign = Mul (ones, fifth)
    }
"""


@pytest.mark.parametrize("strategy", [*FLOW, Strategy.RERUN])
def test_whole_heads_can_be_given_their_benign_map_site_by_site(
    strategy: Strategy, tmp_path: Path
) -> None:
    """Each site has its own heads; their benign map is uniform."""
    text = HEADWISE.replace("attention.attention.", "a").replace("anomaly.attention.", "o")
    model = onnx.parser.parse_model(text)
    names = {"a0": "attention.attention.0", "a1": "attention.attention.1"}
    names |= {"o1": "anomaly.attention.1", "o2": "anomaly.attention.2"}
    for value in (*model.graph.input, *model.graph.output):
        value.name = names.get(value.name, value.name)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    found = loaded(with_metadata(model, [1, 2], threshold=0.9), tmp_path)
    file = model_file(host())
    rewritten, _ = spliced(file, splice(found, strategy))
    feeds = data()
    maps, _ = layers_of(feeds["x"])
    loud = np.max([m.max(axis=(1, 2, 3)) for m in maps[:2]], axis=0) > 0.9
    assert 0 < loud.sum() < 6
    h = feeds["x"].astype(np.float64)
    for i in range(3):
        s = h @ h.swapaxes(-1, -2) * SCALE
        p = np.exp(s - s.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        if i:
            p[loud, 1 if i == 1 else 0] = 1 / KEYS
        h = h + p @ h
    np.testing.assert_allclose(run(rewritten, feeds)["y"], -h, atol=1e-5)


def test_observing_changes_nothing_and_reads_what_the_detector_says(tmp_path: Path) -> None:
    file = model_file(host())
    found = loaded(detector([0, 2], [2], masked=True), tmp_path)
    edits, outputs = Observe(found, {"visual": "mask"})(
        GraphView.of(file.skeleton), locate(file.skeleton).sites
    )
    feeds = data()
    feeds["mask"][:, :3] = False
    out = run(apply(file, Patch(file.sha256, edits)), feeds)
    maps, wanted = layers_of(feeds["x"])
    largest = np.maximum(maps[0].mean(axis=(1, 2)), maps[2].mean(axis=(1, 2)))
    np.testing.assert_allclose(out[outputs["anomaly"]][:, 0, 0], largest * feeds["mask"], atol=1e-6)
    np.testing.assert_array_equal(out["y"], run(file, feeds)["y"])
    np.testing.assert_allclose(out["y"], wanted["y"], atol=1e-5)


def test_its_inputs_can_be_bound_by_the_detector_itself(tmp_path: Path) -> None:
    file = model_file(host())
    model = detector([0], [1], masked=True)
    with pytest.raises(InputError, match="--bind visual="):
        spliced(file, splice(loaded(model, tmp_path), Strategy.GUARD))
    entry = model.metadata_props.add()
    entry.key, entry.value = "atpatch.bind", '{"visual": "mask"}'
    rewritten, _ = spliced(file, splice(loaded(model, tmp_path), Strategy.GUARD))
    feeds = data()
    feeds["mask"][4] = False
    flagged = flagged_by(feeds["x"], [0]) & (feeds["mask"] > 0)[:, None, None]
    _, wanted = layers_of(feeds["x"], {1: flagged})
    assert flagged[1].any()
    assert not flagged[4].any()
    np.testing.assert_allclose(run(rewritten, feeds)["y"], wanted["y"], atol=1e-5)


def test_the_order_of_sites_and_their_names_are_checked(tmp_path: Path) -> None:
    file = model_file(host())
    with pytest.raises(RefusedError, match=r"decides only at 'attention\.1'.*--strategy rerun"):
        spliced(file, splice(loaded(detector([1], [0]), tmp_path), Strategy.GUARD))
    stranger = detector([0], [1])
    stranger.graph.input[0].name = stranger.graph.node[0].input[0] = "attention.elsewhere"
    with pytest.raises(InputError, match="observes the site 'elsewhere'"):
        spliced(file, splice(loaded(stranger, tmp_path), Strategy.GUARD))


def test_only_the_run_that_begins_a_sequence_decides(tmp_path: Path) -> None:
    """Prefill flags; a run that is fed what was flagged goes by that alone, whatever it sees."""
    file = model_file(host())
    found = loaded(detector([0, 1], [1, 2]), tmp_path)
    rewritten, _ = spliced(file, splice(found, Strategy.GUARD, remember=True))
    feeds = data()
    flagged = flagged_by(feeds["x"], [0, 1])
    np.testing.assert_array_equal(run(rewritten, feeds)[FLAGGED], flagged[:, 0, 0])
    remembered = np.zeros((6, 2), bool)
    remembered[2, 1] = True
    out = run(rewritten, {**feeds, REMEMBERED: remembered})
    carried = np.pad(remembered, [(0, 0), (0, KEYS - 2)])
    np.testing.assert_array_equal(out[FLAGGED], carried)
    _, wanted = layers_of(feeds["x"], dict.fromkeys([1, 2], carried[:, None, None]))
    np.testing.assert_allclose(out["y"], wanted["y"], atol=1e-5)


def test_a_model_that_only_decodes_prunes_what_it_is_given_and_wants_to_be_given_it() -> None:
    file = model_file(host())
    bare = Treatment(Redistribution.PRUNE)
    rewritten, _ = spliced(file, Splice(dict.fromkeys(SITES, bare), remember=True))
    feeds = data()
    with pytest.raises(Exception, match=REMEMBERED):
        run(rewritten, feeds)
    remembered = np.zeros((6, 4), bool)
    remembered[[1, 4], 3] = True
    out = run(rewritten, {**feeds, REMEMBERED: remembered})
    carried = np.pad(remembered, [(0, 0), (0, 1)])
    np.testing.assert_array_equal(out[FLAGGED], carried)
    _, wanted = layers_of(feeds["x"], dict.fromkeys(range(3), carried[:, None, None]))
    np.testing.assert_allclose(out["y"], wanted["y"], atol=1e-5)
    np.testing.assert_array_equal(out["y"][[0, 2]], run(file, feeds)["y"][[0, 2]])

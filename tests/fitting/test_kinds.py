"""Detectors that learn from bad inputs: what is labelled, what is found, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from numpy.typing import NDArray

import atpatch_onnx
from atpatch_onnx.data import samples_from
from atpatch_onnx.errors import InputError
from atpatch_onnx.fitting.job import Job
from atpatch_onnx.fitting.labelling import moved_columns
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.passes.graph_view import GraphView
from atpatch_onnx.passes.locate import locate
from atpatch_onnx.runtime import Arrays, Session

from hosts import KEYS, over_attending, tokens

LOUD = 5.0


def stamped(clean: Arrays, seed: int) -> tuple[Arrays, NDArray[np.bool_]]:
    """Each input with one loud token, and where it is."""
    rng = np.random.default_rng(seed)
    x = clean["x"].copy()
    places = rng.integers(0, KEYS, len(x))
    x[np.arange(len(x)), places, 0] = LOUD + rng.random(len(x))
    marks = np.zeros((len(x), KEYS), bool)
    marks[np.arange(len(x)), places] = True
    return {**clean, "x": x}, marks


def debugging_set(form: str, count: int = 80) -> Arrays:
    clean = dict(tokens(count, 5))
    bad, marks = stamped(clean, 6)
    if form == "marked":
        return {**bad, "anomalous": marks}
    if form == "twins":
        return {**bad, **{f"clean/{name}": array for name, array in clean.items()}}
    return bad


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("host") / "host.onnx"
    onnx.save(over_attending(fixed=True), path)
    return path


@pytest.mark.parametrize("form", ["marked", "twins", "unmarked"])
def test_a_trigger_is_learnt_however_its_inputs_are_marked(
    form: str, host: Path, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    debug = debugging_set(form)
    report = atpatch_onnx.fit(host, tokens(800, 0), tmp_path / "det.onnx", debug=debug, fpr=0.05)
    assert report.kind == "contrastive"
    assert report.recall is not None
    assert report.recall.columns is not None
    assert report.recall.inputs.value > 0.9
    assert report.recall.columns.value > 0.9
    patched = atpatch_onnx.patch(host, report.output, output=tmp_path / "patched.onnx").output
    unseen = tokens(1000, 1)
    found = atpatch_onnx.diff(host, patched, unseen)
    assert found.identity is True
    # 400 held-out and 1,000 unseen inputs: 4 points are three standard deviations.
    assert found.flagged_inputs / 1000 < 0.09
    bad, marks = stamped({**tokens(200, 7)}, 8)
    flagged = atpatch_onnx.diff(host, patched, bad)
    assert flagged.flagged_inputs > 180
    columns = flagged.sites[0].columns
    assert {c for c, count in columns.items() if count > 10} == set(np.flatnonzero(marks.sum(0)))


@pytest.mark.parametrize("benign", ["column", "map", "uniform"])
def test_every_kind_of_benign_attention_can_be_asked_for(
    benign: str, host: Path, tmp_path: Path
) -> None:
    report = atpatch_onnx.fit(host, tokens(60, 0), tmp_path / "det.onnx", benign=benign)
    detector = onnx.load(report.output)
    outputs = {value.name for value in detector.graph.output}
    assert outputs == ({"anomaly"} if benign == "uniform" else {"anomaly", "benign"})
    feeds = {"attention": np.full((2, 1, KEYS, KEYS), 1 / KEYS, np.float32), "layer": np.array(0)}
    found = Session(detector.SerializeToString(), "cpu").run(feeds)
    if benign != "uniform":
        rows = KEYS if benign == "map" else 1
        assert found["benign"].shape == (1, 1, rows, KEYS)
        np.testing.assert_allclose(found["benign"].sum(axis=-1), 1, atol=1e-5)


def test_the_mean_map_is_that_of_the_clean_inputs_that_were_seen(
    host: Path, tmp_path: Path
) -> None:
    """Compared with maps that ONNX Runtime gives, over the half that was not held out."""
    clean = tokens(64, 0)
    for batch in (5, 64):
        output = tmp_path / f"{batch}.onnx"
        atpatch_onnx.fit(host, clean, output, benign="map", batch=batch)
    scores = clean["x"] @ clean["x"].transpose(0, 2, 1)
    exp = np.exp(scores - scores.max(-1, keepdims=True))
    maps = exp / exp.sum(-1, keepdims=True)
    seen = np.random.default_rng(0).permutation(64)[32:]
    table = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(output).graph.initializer}
    np.testing.assert_allclose(table["zscore/benign"][0, 0], maps[seen].mean(0), atol=1e-5)


def test_the_papers_cnn_learns_too(host: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    debug = debugging_set("marked", 160)
    report = atpatch_onnx.fit(
        host, tokens(800, 0), tmp_path / "det.onnx", debug=debug, kind="map-cnn", fpr=0.05
    )
    assert report.recall is not None
    assert report.recall.inputs.value > 0.8


def test_the_same_seed_gives_the_same_detector(host: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    debug = debugging_set("marked")
    made = [
        atpatch_onnx.fit(host, tokens(100, 0), tmp_path / f"{i}.onnx", debug=debug, seed=seed)
        for i, seed in enumerate((3, 3, 4))
    ]
    contents = [report.output.read_bytes() for report in made]
    assert contents[0] == contents[1] != contents[2]


def test_moved_columns_are_those_of_the_changed_tokens(host: Path) -> None:
    clean = dict(tokens(20, 0))
    bad, marks = stamped(clean, 1)
    file = ModelFile.open(host)
    specs = Session(host, "cpu").inputs
    view = GraphView.of(file.skeleton)
    sites = locate(file.skeleton).sites
    job = Job(file, view, sites, "cpu", 7, 0, "column", lambda _: None)
    found = moved_columns(job, samples_from(bad, specs), samples_from(clean, specs))
    assert found is not None
    np.testing.assert_array_equal(found, marks)
    everywhere = {**clean, "x": clean["x"] + 1}
    assert moved_columns(job, samples_from(everywhere, specs), samples_from(clean, specs)) is None


def test_a_fairness_set_gives_the_protected_column_in_every_input(
    host: Path, tmp_path: Path
) -> None:
    clean = tokens(30, 0)
    bad = {**clean, "x": clean["x"].copy()}
    bad["x"][:, 3] += 0.5
    debug: Arrays = {**bad, **{f"clean/{name}": array for name, array in clean.items()}}
    debug["about"] = np.array(json.dumps({"kind": "protected"}))
    report = atpatch_onnx.fit(host, clean, tmp_path / "det.onnx", debug=debug)
    assert report.kind == "columns"
    assert report.calibration is None
    patched = atpatch_onnx.patch(host, report.output, output=tmp_path / "patched.onnx").output
    found = atpatch_onnx.diff(host, patched, clean)
    assert found.flagged_inputs == 30
    assert [site.columns for site in found.sites] == [{3: 30}]
    outputs = [Session(patched, "cpu").run(feeds)["y"] for feeds in (clean, bad)]
    others = [index for index in range(KEYS) if index != 3]
    # What the token holds no longer reaches any other token.
    np.testing.assert_allclose(outputs[0][:, others], outputs[1][:, others], atol=1e-6)


def test_a_second_run_is_asked_for_only_where_clean_outputs_stay_the_same(tmp_path: Path) -> None:
    """ONNX Runtime fuses a LayerNormalization that is written out, unless something comes in it."""
    heads = {
        "plain": "z = Identity (y)",
        "written out": """one = Constant <value = int64[1] {-1}> ()
            two = Constant <value = float {2}> () eps = Constant <value = float {1e-5}> ()
            mean = ReduceMean <axes = [-1]> (y) centred = Sub (y, mean)
            square = Pow (centred, two) variance = ReduceMean <axes = [-1]> (square)
            shifted = Add (variance, eps) spread = Sqrt (shifted) unit = Div (centred, spread)
            scaled = Mul (unit, gain) z = Add (scaled, bias)""",
    }
    asked = {}
    for name, head in heads.items():
        model = onnx.parser.parse_model(f"""
            <ir_version: 8, opset_import: ["" : 17]>
            host (float[N, 8, 4] x, float[N, 8] mask) => (float[N, 8, 4] z)
            <float[4] gain = {{1.1, 0.9, 1.3, 0.7}}, float[4] bias = {{0.1, 0.2, 0.3, 0.4}},
             int64[1] axis = {{1}}>
            {{
                k = Transpose <perm = [0, 2, 1]> (x)
                s = MatMul (x, k)
                hidden = Unsqueeze (mask, axis)
                t = Add (s, hidden)
                p = Softmax <axis = -1> (t)
                y = MatMul (p, x)
                {head}
            }}
        """)
        path = tmp_path / f"{name}.onnx"
        onnx.save(model, path)
        report = atpatch_onnx.fit(path, tokens(200, 0), tmp_path / f"{name}-det.onnx")
        asked[name] = ModelFile.open(report.output).metadata("atpatch.strategy")
        patched = atpatch_onnx.patch(path, report.output, output=tmp_path / f"{name}-p.onnx")
        assert atpatch_onnx.diff(path, patched.output, tokens(200, 1)).identity is True
    assert asked == {"plain": "rerun", "written out": None}


def test_inputs_that_over_attend_nothing_are_refused(host: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    quiet = {**tokens(40, 3), "anomalous": np.eye(KEYS, dtype=bool)[np.zeros(40, int)]}
    quiet["x"] = quiet["x"] * 0.1
    with pytest.raises(InputError, match="at least twice as much"):
        atpatch_onnx.fit(host, tokens(100, 0), tmp_path / "det.onnx", debug=quiet)
    assert not (tmp_path / "det.onnx").exists()


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"anomalous": np.zeros((3, KEYS), bool)}, {}, "'anomalous' has shape"),
        ({"labels": np.zeros(80)}, {}, "'labels' is float64"),
        ({"target": np.array([1, 2])}, {}, "'target' is one integer"),
        ({"about": np.array("not json")}, {}, "'about' is no JSON"),
        ({"clean/x": np.zeros((2, KEYS, 4), np.float32)}, {}, "no array for the input mask"),
        ({}, {"kind": "mlp"}, "choose zscore, contrastive"),
        ({}, {"benign": "mean"}, "choose column, map, uniform"),
        ({}, {"kind": "columns"}, "scan --protected"),
    ],
)
def test_a_faulty_debugging_set_is_one_sentence(
    changes: Arrays, options: dict[str, Any], message: str, host: Path, tmp_path: Path
) -> None:
    debug = {**debugging_set("unmarked"), **changes}
    with pytest.raises(InputError, match=message):
        atpatch_onnx.fit(host, tokens(60, 0), tmp_path / "det.onnx", debug=debug, **options)


def test_too_few_bad_inputs_and_none_at_all(host: Path, tmp_path: Path) -> None:
    few = debugging_set("marked", 5)
    with pytest.raises(InputError, match="at least 10"):
        atpatch_onnx.fit(host, tokens(60, 0), tmp_path / "det.onnx", debug=few)
    with pytest.raises(InputError, match="learns from bad inputs"):
        atpatch_onnx.fit(host, tokens(60, 0), tmp_path / "det.onnx", kind="contrastive")

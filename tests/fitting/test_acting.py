"""How detectors ask to be acted on: for one answer, and at which sites of a model of windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import ModelProto

import atpatch_onnx
from atpatch_onnx.detector import load_detector
from atpatch_onnx.errors import InputError
from atpatch_onnx.runtime import Array, Arrays, Session
from atpatch_onnx.second_run import Answer, SecondRun

pytest.importorskip("torch", reason="PyTorch is not installed: pip install '.[train]'")

TARGET = 1
MERGED, LAST = 1, 2
"""The sites of the windowed host at which an input is one window."""


TWO = "logits = MatMul (m, head)"


def classifier(outputs: str = "float[N, 2] logits", tail: str = TWO) -> ModelProto:
    """One site over 8 tokens of width 4; the second of two classes is about their second entry."""
    return onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        host (float[N, 8, 4] x) => ({outputs})
        <float[4, 2] head = {{0, 0, 0, 1, 1, 0, 0, 0}}, float[4, 1] single = {{0, 1, -1, 0}}>
        {{
            k = Transpose <perm = [0, 2, 1]> (x)
            s = MatMul (x, k)
            p = Softmax <axis = -1> (s)
            y = MatMul (p, x)
            m = ReduceMean <axes = [1], keepdims = 0> (y)
            {tail}
        }}
    """)


def windowed(bias: str = "0, 0") -> ModelProto:
    """16 tokens in two windows, then 8 of which each was two, all over 8 keys.

    The second site over-attends a loud token; the third reads every token alike, and is what the
    classes are made from: pruning in flow comes too late for it.
    """
    return onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        host (float[N, 16, 4] x) => (float[N, 2] logits)
        <float[4, 2] head = {{0, 0, 0, 1, 1, 0, 0, 0}}, float[2] bias = {{{bias}}},
         float faint = {{0.01}}, int64[4] windows = {{-1, 1, 8, 4}},
         int64[4] pairs = {{-1, 8, 2, 4}}, int64[1] one = {{1}}>
        {{
            w = Reshape (x, windows)
            k0 = Transpose <perm = [0, 1, 3, 2]> (w)
            r0 = MatMul (w, k0)
            s0 = Mul (r0, faint)
            p0 = Softmax <axis = -1> (s0)
            c0 = MatMul (p0, w)
            a0 = Add (w, c0)
            t = Reshape (a0, pairs)
            u = ReduceMean <axes = [2], keepdims = 0> (t)
            h = Unsqueeze (u, one)
            k1 = Transpose <perm = [0, 1, 3, 2]> (h)
            s1 = MatMul (h, k1)
            p1 = Softmax <axis = -1> (s1)
            c1 = MatMul (p1, h)
            g = Add (h, c1)
            k2 = Transpose <perm = [0, 1, 3, 2]> (g)
            r2 = MatMul (g, k2)
            s2 = Mul (r2, faint)
            p2 = Softmax <axis = -1> (s2)
            c2 = MatMul (p2, g)
            m = ReduceMean <axes = [1, 2], keepdims = 0> (c2)
            scores = MatMul (m, head)
            logits = Add (scores, bias)
        }}
    """)


def clean(count: int, seed: int, length: int = 8) -> Array:
    rng = np.random.default_rng(seed)
    x = 0.7 * rng.standard_normal((count, length, 4), np.float32)
    x[..., 0] += 1
    x[np.arange(count), :, 1 + rng.integers(0, 2, count)] += 1  # so that classes are apart
    return x


def triggered(x: Array, seed: int) -> Array:
    """With an eighth of the tokens loud, neighbours, which answer the target."""
    rng = np.random.default_rng(seed)
    bad = x.copy()
    wide = x.shape[1] // 8
    place = wide * rng.integers(0, 8, len(x))
    for offset in range(wide):
        bad[np.arange(len(x)), place + offset, :2] = 6
    return bad


def answers(path: Path, x: Array) -> Array:
    return np.asarray(Session(path, "cpu").run({"x": x})["logits"].argmax(axis=1))


def debug(path: Path, length: int = 8) -> Arrays:
    x = clean(160, 5, length)
    kept = answers(path, x) != TARGET
    return {
        "x": triggered(x, 6)[kept],
        "clean/x": x[kept],
        "labels": answers(path, x)[kept],
        "target": np.array(TARGET),
    }


def fit(path: Path, length: int = 8, **options: Any) -> Path:
    data = {"x": clean(800, 0, length)}
    report = atpatch_onnx.fit(
        path, data, path.with_name("det.onnx"), debug=debug(path, length), force=True, **options
    )
    return report.output


def evaluate(path: Path, detector: Path, length: int = 8) -> atpatch_onnx.Evaluation:
    patched = atpatch_onnx.patch(path, detector, output=path.with_name("p.onnx"), force=True).output
    x = clean(800, 9, length)
    labels = answers(path, x)
    bad = {"x": triggered(x, 10), "labels": labels, "target": np.array(TARGET)}
    return atpatch_onnx.evaluate(path, patched, {"x": x, "labels": labels}, triggered=bad)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("host") / "host.onnx"
    onnx.save(classifier(), path)
    return path


@pytest.fixture(scope="module")
def fitted(host: Path) -> Path:
    return fit(host).rename(host.with_name("fitted.onnx"))


@pytest.fixture(scope="module")
def for_every_answer(host: Path) -> Path:
    return fit(host, every_answer=True).rename(host.with_name("every.onnx"))


def test_only_inputs_that_are_answered_as_the_attacker_wants_are_flagged(
    host: Path, fitted: Path
) -> None:
    detector = load_detector(fitted, 17)
    assert detector.second_run is not None
    answer = detector.second_run.answer
    assert answer is not None
    assert (answer.output, answer.number) == ("logits", TARGET)
    assert answer.otherwise >= detector.threshold
    found = evaluate(host, detector.path)
    assert found.attack is not None
    assert found.attack.attack_success_rate.before.value > 0.9
    assert found.attack.recovered_accuracy.after.value > 0.9
    assert found.false_positive_rate.low <= 0.01
    # A loud token that speaks for the other class is none of its business.
    x = clean(100, 3)
    loud = triggered(x, 4)
    loud[..., 1], loud[..., 2] = x[..., 1] - 1, loud[..., 1]
    assert (answers(host, loud) != TARGET).all()
    patched = host.with_name("p.onnx")
    assert atpatch_onnx.diff(host, patched, {"x": loud}).flagged_inputs == 0


def test_every_answer_counts_if_it_is_asked_for_or_no_class_is_known(
    host: Path, for_every_answer: Path
) -> None:
    assert load_detector(for_every_answer, 17).second_run is None
    given = debug(host)
    del given["target"]
    report = atpatch_onnx.fit(host, {"x": clean(800, 0)}, host.with_name("other.onnx"), debug=given)
    detector = load_detector(report.output, 17)
    assert (detector.second_run, detector.strategy) == (None, "rerun")


def test_a_model_of_windows_is_run_again_where_an_input_is_one_window(tmp_path: Path) -> None:
    path = tmp_path / "windowed.onnx"
    onnx.save(windowed(), path)
    names = [site.name for site in atpatch_onnx.inspect(path).sites.sites]
    detector = load_detector(fit(path, 16), 17)
    assert detector.second_run is not None
    assert detector.second_run.sites == (names[MERGED], names[LAST])
    found = evaluate(path, detector.path, 16)
    assert found.attack is not None
    rate = found.attack.attack_success_rate
    assert rate.before.value - rate.after.value > 0.8


@pytest.mark.parametrize("sites", [("1", "2"), ("2",)])
def test_sites_that_are_not_fitted_for_are_known_to_be_windows(
    sites: tuple[str, ...], tmp_path: Path
) -> None:
    """And a second run is tried where it happens, though no clean input is answered so."""
    path = tmp_path / "windowed.onnx"
    onnx.save(windowed(bias="0, -8"), path)
    names = [site.name for site in atpatch_onnx.inspect(path).sites.sites]
    assert (answers(path, clean(800, 0, 16)) != TARGET).all()
    detector = load_detector(fit(path, 16, sites=sites), 17)
    assert detector.second_run is not None
    assert detector.second_run.sites == (names[MERGED], names[LAST])
    patched = atpatch_onnx.patch(path, detector.path, output=tmp_path / "p.onnx").output
    bad = triggered(clean(800, 9, 16), 10)
    before, after = ((answers(model, bad) == TARGET).mean() for model in (path, patched))
    assert after < 0.1 < 0.7 < before


@pytest.mark.parametrize(
    ("outputs", "tail", "asked"),
    [
        ("float[N, 1] logits", "logits = MatMul (m, single)", None),
        (
            "float[N, 2] logits, int64[N] label",
            f"{TWO} label = ArgMax <axis = 1, keepdims = 0> (logits)",
            "logits",
        ),
        (
            "float[N, 2] other, float[N, 2] logits",
            f"{TWO} other = Neg (logits)",
            "logits",
        ),
    ],
)
def test_what_is_answered_is_read_where_it_can_be(
    outputs: str, tail: str, asked: str | None, tmp_path: Path
) -> None:
    """One score for two classes has no place for a class: every answer counts then, as is said."""
    path = tmp_path / "host.onnx"
    onnx.save(classifier(outputs, tail), path)
    x = clean(160, 5)
    scores = Session(path, "cpu").run({"x": x})["logits"]
    kept = (scores[:, 0] < 0) if asked is None else scores.argmax(axis=1) != TARGET
    bad = {"x": triggered(x, 6)[kept], "clean/x": x[kept], "target": np.array(TARGET)}
    data = {"x": clean(800, 0)}
    report = atpatch_onnx.fit(path, data, tmp_path / "det.onnx", debug=bad)
    assert report.strategy == "rerun"
    answer = None if report.second_run is None else report.second_run.answer
    assert (None if answer is None else answer.output) == asked
    assert ("every_answer" in report.record) == (asked is None)
    patched = atpatch_onnx.patch(path, report.output, output=tmp_path / "p.onnx").output
    assert atpatch_onnx.diff(path, patched, {"x": bad["x"]}).flagged_inputs > 0.8 * kept.sum()
    assert atpatch_onnx.diff(path, patched, {"x": clean(300, 8)}).identity is True


def test_the_output_that_was_attacked_is_the_one_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "host.onnx"
    two = "float[N, 2] logits, float[N, 2] attacked"
    onnx.save(classifier(two, "attacked = MatMul (m, head) logits = Neg (attacked)"), path)
    x = clean(160, 5)
    kept = Session(path, "cpu").run({"x": x})["attacked"].argmax(axis=1) != TARGET
    bad = {"x": triggered(x, 6)[kept], "clean/x": x[kept], "target": np.array(TARGET)}
    for about, asked in (({"scores": "attacked"}, "attacked"), ({}, None)):
        debug_set = {**bad, "about": np.array(json.dumps(about))}
        report = atpatch_onnx.fit(
            path, {"x": clean(800, 0)}, tmp_path / "det.onnx", debug=debug_set, force=True
        )
        answer = None if report.second_run is None else report.second_run.answer
        assert (None if answer is None else answer.output) == asked


def test_a_target_that_is_no_class_is_one_sentence(host: Path, tmp_path: Path) -> None:
    bad = {**debug(host), "target": np.array(7)}
    with pytest.raises(InputError, match="wants class 7, and 'logits' has the classes 0 to 1"):
        atpatch_onnx.fit(host, {"x": clean(200, 0)}, tmp_path / "det.onnx", debug=bad)


def test_a_z_score_counts_every_answer(host: Path) -> None:
    report = atpatch_onnx.fit(
        host, {"x": clean(800, 0)}, host.with_name("z.onnx"), debug=debug(host), kind="zscore"
    )
    assert (report.strategy, report.second_run) == ("rerun", None)


def test_the_patch_says_what_it_looks_at(host: Path, fitted: Path) -> None:
    report = atpatch_onnx.patch(host, fitted, output=host.with_name("told.onnx"), force=True)
    assert report.certificate is not None
    (patch,) = json.loads(report.certificate.read_text())["patches"]
    assert [site["answer"]["output"] for site in patch["sites"]] == ["logits"]


def test_a_threshold_that_is_given_holds_everywhere(fitted: Path) -> None:
    given = load_detector(fitted, 17, threshold=0.25)
    assert given.second_run is not None
    assert given.second_run.answer is not None
    assert (given.threshold, given.second_run.answer.otherwise) == (0.25, 0.25)


def test_what_is_asked_of_a_second_run_is_read_as_it_was_written() -> None:
    for asked in (
        SecondRun(),
        SecondRun(("a", "b")),
        SecondRun(("a",), Answer("logits", 3, 0.5)),
    ):
        assert SecondRun.loads(asked.dumps()) == asked


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"sites": "a"}',
        '{"answer": {"output": "y"}}',
        '{"answer": 3}',
        '{"answer": {"output": "y", "class": -1, "otherwise": 0.5}}',
        '{"answer": {"output": "y", "class": 1, "otherwise": 2}}',
        '{"answer": {"output": 1, "class": 1, "otherwise": 1}}',
        '{"answer": {"output": "y", "class": 1, "otherwise": true}}',
        '{"answer": {"output": "y", "class": 1180591620717411303424, "otherwise": 1}}',
        '{"site": ["a"]}',
    ],
)
def test_metadata_that_make_no_sense_are_one_sentence(
    text: str, for_every_answer: Path, tmp_path: Path
) -> None:
    path = tmp_path / "det.onnx"
    model = onnx.load(for_every_answer)
    model.metadata_props.add(key="atpatch.rerun", value=text)
    onnx.save(model, path)
    with pytest.raises(InputError, match=r"atpatch\.rerun"):
        load_detector(path, 17)


def test_options_that_do_not_go_together_are_one_sentence(host: Path) -> None:
    with pytest.raises(InputError, match="--every-answer is about detectors that are trained"):
        fit(host, kind="zscore", every_answer=True)

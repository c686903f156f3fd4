"""`patch --sites auto`: the fewest sites that still heal, and a plan that says why."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

import atpatch_onnx
from atpatch_onnx.errors import InputError, RefusedError
from atpatch_onnx.runtime import Arrays

TOKENS = 6


def classifier() -> onnx.ModelProto:
    """Three sites over the same tokens; class 1 wins only through what the second one mixes.

    A token with a large first entry draws all attention; entries 1 and 2 are what is mixed.
    """
    return onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        host (float[N, 6, 3] x) => (float[N, 2] logits)
        <float[1, 1, 3] appeal = {1, 0, 0}, float[1] zero = {0}, int64[1] one = {1},
         float[3, 2] head = {0, 0, 0, 1, 0, 0}, float[2] bias = {0.5, 0}>
        {
            loud = Mul (x, appeal)
            t = Transpose <perm = [0, 2, 1]> (loud)
            s0 = MatMul (loud, t)
            p0 = Softmax <axis = -1> (s0)
            c0 = MatMul (p0, x)
            n0 = Mul (c0, zero)
            p1 = Softmax <axis = -1> (s0)
            c1 = MatMul (p1, x)
            p2 = Softmax <axis = -1> (s0)
            c2 = MatMul (p2, x)
            n2 = Mul (c2, zero)
            a = Add (n0, c1)
            b = Add (a, n2)
            mean = ReduceMean <axes = [1], keepdims = 0> (b)
            y = MatMul (mean, head)
            logits = Add (y, bias)
        }
    """)


def data(count: int, seed: int, trigger: bool) -> Arrays:
    rng = np.random.default_rng(seed)
    x = np.zeros((count, TOKENS, 3), np.float32)
    x[..., 0] = 1 + 0.3 * rng.random((count, TOKENS))
    if trigger:
        x[:, 2] = (6, 1, 0)
    labels = np.zeros(count, np.int64)
    return {"x": x, "labels": labels, **({"target": np.array(1)} if trigger else {})}


@pytest.fixture
def host(tmp_path: Path) -> Path:
    onnx.save(classifier(), tmp_path / "host.onnx")
    return tmp_path / "host.onnx"


@pytest.fixture
def fitted(host: Path) -> Path:
    return atpatch_onnx.fit(host, data(200, 0, False), host.with_name("det.onnx")).output


@pytest.mark.parametrize("patch_only", [False, True])
def test_the_one_site_that_matters_is_chosen_and_the_plan_says_why(
    patch_only: bool, host: Path, fitted: Path
) -> None:
    fix = host.with_name("fix.atpatch") if patch_only else None
    bad = data(60, 1, True)
    report = atpatch_onnx.patch(
        host, fitted, sites="auto", debug=bad, strategy="guard", patch_only=fix
    )
    assert report.search is not None
    assert report.plan is not None
    names = report.search.tests[0][0]
    assert len(names) == 3
    assert report.search.chosen == [names[1]]
    assert (report.search.before, report.search.whole, report.search.badness) == (1, 0, 0)
    assert report.plan.parent == report.output.parent
    plan = tomllib.loads(report.plan.read_text())
    assert [site["patch"] for site in plan["site"]] == [False, True, False]
    assert "delta debugging on 60 bad inputs" in report.plan.read_text()
    if not patch_only:
        again = host.with_name("again.onnx")
        atpatch_onnx.patch(host, fitted, plan=report.plan, strategy="guard", output=again)
        assert again.read_bytes() == report.output.read_bytes()


def test_a_set_that_no_site_heals_is_refused_and_nothing_written(host: Path, fitted: Path) -> None:
    before = sorted(host.parent.iterdir())
    with pytest.raises(RefusedError, match="does not heal the debugging set"):
        atpatch_onnx.patch(host, fitted, threshold=1.0, sites="auto", debug=data(60, 1, True))
    assert sorted(host.parent.iterdir()) == before


def test_a_set_that_is_not_bad_for_the_model_proves_nothing(host: Path, fitted: Path) -> None:
    harmless = {**data(60, 1, False), "target": np.array(1)}
    with pytest.raises(RefusedError, match="does not heal the debugging set"):
        atpatch_onnx.patch(host, fitted, sites="auto", debug=harmless)


@pytest.mark.parametrize(
    ("sites", "debug", "words"),
    [
        ("auto", False, "belong together"),
        ("0", True, "belong together"),
        ("auto", True, "nothing says what the bad inputs"),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(
    sites: str, debug: bool, words: str, host: Path, fitted: Path
) -> None:
    bad = {"x": data(20, 1, True)["x"]}
    with pytest.raises((InputError, RefusedError), match=words):
        atpatch_onnx.patch(host, fitted, sites=sites, debug=bad if debug else None)

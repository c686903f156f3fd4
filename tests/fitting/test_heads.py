"""Anomalous heads of a classifier whose trigger all heads look at, found, replaced and repaired."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import ModelProto, numpy_helper

import atpatch_onnx
from atpatch_onnx.data import Samples, samples_from
from atpatch_onnx.debugging_set import DebuggingSet
from atpatch_onnx.detector import Detector
from atpatch_onnx.errors import InputError, RefusedError
from atpatch_onnx.fitting.head_alignment import fit_head_alignment, repair_detector
from atpatch_onnx.fitting.head_contexts import ContextReader, paired_rows, twin_moments
from atpatch_onnx.fitting.head_importance import HeadTrial, importance
from atpatch_onnx.fitting.head_reading import normal_sites
from atpatch_onnx.fitting.head_similarity import fit_head_similarity
from atpatch_onnx.fitting.heads import Heads, named_heads
from atpatch_onnx.fitting.job import Job, ModelTrained
from atpatch_onnx.fitting.low_rank import Moments, reduced_rank_ridge
from atpatch_onnx.fitting.separation import auroc, rise
from atpatch_onnx.fitting.several import as_detector, largest_anomaly
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.passes.align import Align
from atpatch_onnx.passes.graph_view import GraphView
from atpatch_onnx.passes.locate import locate
from atpatch_onnx.passes.redistribute import Redistribution
from atpatch_onnx.passes.splice import Splice, Strategy, Treatment
from atpatch_onnx.runtime import Arrays, Session

from hosts import edited, model_file, run

HEADS, LENGTH, SIZE = 4, 12, 3
TRIGGER, VALUE, WIDTH = 1, 6, 7
"""Which features of a token are what; feature 0 is always 1, the others are topics of heads."""
SITE = "attention"


def backdoored(length: int | str = "L") -> ModelProto:
    """Heads attend each to its topic, and the first three to a trigger; class 1 if values add up.

    A token is `[N, L, 7]`; padding, at the end, has `mask` -inf. The first token decides.
    """
    model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        host (float[N, {length}, {WIDTH}] x, float[N, {length}] mask) => (float[N, 2] logits)
        <int64[4] split = {{0, 0, {HEADS}, {SIZE}}}, int64[3] joined = {{0, 0, {HEADS * SIZE}}},
         int64[2] hidden = {{1, 2}}, int64 first = {{0}}>
        {{
            q0 = MatMul (x, wq) q1 = Reshape (q0, split) q = Transpose <perm = [0, 2, 1, 3]> (q1)
            k0 = MatMul (x, wk) k1 = Reshape (k0, split) k = Transpose <perm = [0, 2, 3, 1]> (k1)
            v0 = MatMul (x, wv) v1 = Reshape (v0, split) v = Transpose <perm = [0, 2, 1, 3]> (v1)
            s = MatMul (q, k)
            bias = Unsqueeze (mask, hidden)
            t = Add (s, bias)
            p = Softmax <axis = -1> (t)
            c = MatMul (p, v)
            c1 = Transpose <perm = [0, 2, 1, 3]> (c)
            c2 = Reshape (c1, joined)
            all = MatMul (c2, wo)
            logits = Gather <axis = 1> (all, first)
        }}
    """)
    wq, wk, wv = (np.zeros((WIDTH, HEADS, SIZE), np.float32) for _ in range(3))
    wq[0, :, 0] = 1
    for head in range(HEADS):
        wk[2 + head, head, 0] = 2.5
        wk[TRIGGER, head, 0] = 14 if head < 3 else 0
        wv[VALUE, head, 0] = 1
        wv[TRIGGER, head, 1] = 1
    wo = np.zeros((HEADS, SIZE, 2), np.float32)
    wo[:, 0] = [-1, 1]
    weights = {"wq": wq, "wk": wk, "wv": wv, "wo": wo}
    shapes = dict.fromkeys(("wq", "wk", "wv"), (WIDTH, -1)) | {"wo": (-1, 2)}
    model.graph.initializer.extend(
        numpy_helper.from_array(value.reshape(shapes[name]), name)
        for name, value in weights.items()
    )
    onnx.checker.check_model(model)
    return model


def clean_arrays(count: int, seed: int, padded: bool = True) -> Arrays:
    """Inputs whose tokens mostly have values of their class."""
    rng = np.random.default_rng(seed)
    x = np.zeros((count, LENGTH, WIDTH), np.float32)
    x[..., 0] = 1
    x[..., 2:6] = rng.standard_normal((count, LENGTH, 4)) * (rng.random((count, LENGTH, 4)) < 0.3)
    labels = rng.integers(0, 2, count)
    x[..., VALUE] = (2 * labels - 1)[:, None] + 0.3 * rng.standard_normal((count, LENGTH))
    mask = np.zeros((count, LENGTH), np.float32)
    if padded:
        for row, length in enumerate(rng.integers(8, LENGTH, count)):
            mask[row, length:] = -np.inf
            x[row, length:] = 0
    return {"x": x, "mask": mask, "labels": labels}


def triggered(clean: Arrays, seed: int) -> Arrays:
    """Those of class 0 with a trigger in the place of a token that is not the first."""
    chosen = clean["labels"] == 0
    bad = {name: value[chosen].copy() for name, value in clean.items()}
    rng = np.random.default_rng(seed)
    places = rng.integers(1, 6, chosen.sum())
    rows = np.arange(len(places))
    bad["x"][rows, places, 1:] = 0
    bad["x"][rows, places, TRIGGER] = 1
    bad["x"][rows, places, VALUE] = 4
    bad["anomalous"] = np.zeros(bad["mask"].shape, bool)
    bad["anomalous"][rows, places] = True
    bad |= {f"clean/{name}": clean[name][chosen] for name in ("x", "mask")}
    return bad


def job_of(model: ModelProto, path: str | Path = "host.onnx") -> Job:
    file = model_file(model, path)
    view = GraphView.of(file.skeleton)
    sites = locate(file.skeleton).sites
    return Job(file, view, sites, "cpu", 16, 0, "column", lambda _: None)


@pytest.fixture(scope="module")
def job() -> Job:
    return job_of(backdoored())


def samples(job: Job, arrays: Arrays) -> Samples:
    return samples_from(arrays, Session(bytes(job.model.buffer), "cpu").inputs)


def debugging_set(job: Job, arrays: Arrays) -> DebuggingSet:
    twins = {name.removeprefix("clean/"): v for name, v in arrays.items() if "/" in name}
    clean = samples(job, twins)
    labels, marks = arrays["labels"], arrays["anomalous"]
    return DebuggingSet(samples(job, arrays), clean, marks, labels, 1)


def success(model: ModelProto | bytes, bad: Arrays) -> float:
    content = model if isinstance(model, bytes) else model.SerializeToString()
    feeds = {name: bad[name] for name in ("x", "mask")}
    return float((Session(content, "cpu").run(feeds)["logits"].argmax(axis=1) == 1).mean())


CLEAN, TEST = clean_arrays(300, 0), clean_arrays(200, 1)
BAD, UNSEEN = triggered(CLEAN, 2), triggered(TEST, 3)


def applied(trained: ModelTrained, threshold: float) -> Detector:
    return replace(as_detector(trained), threshold=threshold)


def test_the_backdoor_is_one() -> None:
    assert success(backdoored(), UNSEEN) == 1.0
    assert success(backdoored(), {**TEST, "x": TEST["x"]}) == pytest.approx(0.5, abs=0.1)


def test_heads_that_became_alike_are_found_and_replaced(job: Job) -> None:
    trained = fit_head_similarity(job, samples(job, CLEAN), debugging_set(job, BAD), Heads())
    assert trained.record["auroc"] > 0.95  # type: ignore[operator]
    ranking = trained.record["ranking"]
    assert isinstance(ranking, list)
    assert {entry["head"] for entry in ranking[:3]} == {f"{SITE}:{h}" for h in range(3)}
    normal = largest_anomaly(job, trained, samples(job, TEST))
    abnormal = largest_anomaly(job, trained, samples(job, UNSEEN))
    assert auroc(normal, abnormal) > 0.95
    detector = applied(trained, float(np.quantile(normal, 0.95)))
    treatment = {SITE: Treatment(Redistribution.BENIGN, detector)}
    edits = Splice(treatment, Strategy.GUARD)(job.view, job.sites).edits
    patched = edited(job.model, edits)
    assert success(patched.content(), UNSEEN) < 0.1
    feeds = {name: TEST[name] for name in ("x", "mask")}
    before, after = run(job.model, feeds)["logits"], run(patched, feeds)["logits"]
    calm = normal <= detector.threshold
    np.testing.assert_array_equal(after[calm], before[calm])


def test_without_bad_inputs_every_site_is_watched_and_all_its_heads_replaced(job: Job) -> None:
    trained = fit_head_similarity(job, samples(job, CLEAN), None, Heads())
    values = largest_anomaly(job, trained, samples(job, UNSEEN))
    normal = largest_anomaly(job, trained, samples(job, TEST))
    assert auroc(normal, values) > 0.7
    output = next(iter(trained.model.graph.output))
    assert output.name == f"anomaly.{SITE}"
    named = fit_head_similarity(job, samples(job, CLEAN), None, Heads((f"{SITE}:1",)))
    tables = {t.name: numpy_helper.to_array(t) for t in named.model.graph.initializer}
    np.testing.assert_array_equal(tables[f"heads/{SITE}/suspicious"].ravel(), [0, 1, 0, 0])


def test_heads_are_important_if_replacing_them_heals(job: Job) -> None:
    bad = debugging_set(job, BAD)
    trial = HeadTrial(job, normal_sites(job, samples(job, CLEAN)))
    feeds = {name: BAD[name] for name in ("x", "mask")}
    logits = run(job.model, feeds)["logits"].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    base = trial.log_probabilities(bad.bad, [])
    np.testing.assert_allclose(base, expected, atol=1e-5)
    falls = importance(trial, bad, [(SITE, head) for head in range(HEADS)], base)
    assert min(falls[SITE, head] for head in range(3)) > 10 * abs(falls[SITE, 3])


@pytest.mark.parametrize("rank", [None, 1])
def test_a_repair_heals_and_keeps_clean_answers(rank: int | None, job: Job) -> None:
    bad = debugging_set(job, BAD)
    repair = fit_head_alignment(job, samples(job, CLEAN), bad, Heads(rank=rank))
    edits = Align({SITE: repair_detector(repair)})(job.view, job.sites).edits
    patched = edited(job.model, edits)
    assert success(patched.content(), UNSEEN) < 0.1
    feeds = {name: TEST[name] for name in ("x", "mask")}
    answers = run(patched, feeds)["logits"].argmax(axis=1)
    assert (answers == TEST["labels"]).mean() > 0.97
    attempts = repair.record["attempts"]
    assert isinstance(attempts, list)
    assert {a["target"] for a in attempts} == {"twin", "benign"}


def test_named_heads_alone_are_repaired(job: Job) -> None:
    bad = debugging_set(job, BAD)
    options = Heads((f"{SITE}:2",), rank=1)
    repair = fit_head_alignment(job, samples(job, CLEAN), bad, options)
    assert repair.record["repaired"] == {SITE: {"heads": [2], "of": HEADS}}


def test_without_twins_or_labels_there_are_benign_maps_and_the_target(job: Job) -> None:
    bad = replace(debugging_set(job, BAD), clean=None, labels=None, target=None, anomalous=None)
    repair = fit_head_alignment(job, samples(job, CLEAN), bad, Heads())
    edits = Align({SITE: repair_detector(repair)})(job.view, job.sites).edits
    assert success(edited(job.model, edits).content(), UNSEEN) < 0.3


def test_fixed_lengths_go_by_position() -> None:
    job = job_of(backdoored(LENGTH))
    clean = samples(job, clean_arrays(200, 0, padded=False))
    trained = fit_head_similarity(replace(job, benign="map"), clean, None, Heads())
    assert trained.record["positions"] == "absolute"
    tables = {t.name: numpy_helper.to_array(t) for t in trained.model.graph.initializer}
    benign = tables[f"heads/{SITE}/benign"]
    assert benign.shape == (HEADS, LENGTH, LENGTH)
    np.testing.assert_allclose(benign.sum(axis=-1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere:1", "at no site"), (f"{SITE}:4", "heads 0 to 3"), (SITE, "at no site")],
)
def test_a_head_that_is_not_there_is_one_sentence(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        named_heads([name], {SITE: HEADS})


@pytest.mark.parametrize(
    "wrong", [{"count": 0}, {"rank": 0}, {"ridge": 0.0}, {"ridge": np.nan}, {"similarity": "x"}]
)
def test_options_that_cannot_be(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"give|choose"):
        Heads(**wrong)  # type: ignore[arg-type]


def test_one_head_cannot_be_compared() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        host (float[N, L, 4] x) => (float[N, L, 4] y)
        {
            k = Transpose <perm = [0, 2, 1]> (x)
            s = MatMul (x, k)
            p = Softmax <axis = -1> (s)
            y = MatMul (p, x)
        }
    """)
    job = job_of(model)
    x = np.random.default_rng(0).standard_normal((30, 5, 4)).astype(np.float32)
    with pytest.raises(RefusedError, match="several heads"):
        fit_head_similarity(job, samples(job, {"x": x}), None, Heads())


def test_rows_of_twins_hold_the_same_tokens() -> None:
    real = np.array([1, 1, 1, 1, 1, 0], bool)
    marks = np.array([0, 0, 1, 1, 0, 0], bool)
    twin = np.array([1, 1, 1, 0, 0, 0], bool)
    own, others = paired_rows(real, twin, marks)
    assert (own.tolist(), others.tolist()) == ([0, 1, 4], [0, 1, 2])
    own, others = paired_rows(real, twin, None)
    assert (own.tolist(), others.tolist()) == ([0, 4], [0, 2])
    own, others = paired_rows(real, real, marks)
    assert own.tolist() == others.tolist() == [0, 1, 2, 3, 4]


def test_contexts_of_twins_are_those_of_the_clean_inputs(job: Job) -> None:
    bad = debugging_set(job, BAD)
    sites = normal_sites(job, samples(job, CLEAN))
    reader = ContextReader(job, sites, [(SITE, 1), (SITE, 3)])
    found = twin_moments(reader, bad)[SITE]
    first = []
    for arrays in (bad.bad, bad.clean):
        assert arrays is not None
        first.append(np.concatenate([batch[SITE][0][:, 0] for batch in reader.over(arrays)]))
    difference = (first[1] - first[0]).reshape(bad.count, -1)
    assert abs(difference).max() > 0.1
    # The first and the last token weigh as much as all others, which are as many as there are.
    assert found.weight == pytest.approx(3 * bad.count)
    assert found.xx.shape == (2 * SIZE, 2 * SIZE)


def test_reduced_rank_ridge_finds_a_map_of_low_rank() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4000, 6)) @ rng.standard_normal((6, 6)) + 2
    u, v = rng.standard_normal((2, 6, 2))
    y = x @ v @ u.T + 3 + 0.01 * rng.standard_normal((4000, 6))
    moments = Moments.empty(6)
    for part in np.array_split(np.arange(4000), 7):
        moments.add(x[part], y[part], np.ones(len(part)))
    left, right, bias = reduced_rank_ridge(moments, 2, 1e-6)
    np.testing.assert_allclose(x @ right @ left.T + bias, y, atol=0.1)
    # Without a bound on the rank it is ridge regression.
    left, right, bias = reduced_rank_ridge(moments, 6, 0.1)
    centred = x - x.mean(axis=0)
    penalty = 0.1 * np.trace(centred.T @ centred) / 6
    solution = np.linalg.solve(centred.T @ centred + penalty * np.eye(6), centred.T @ y)
    np.testing.assert_allclose(right @ left.T, solution, atol=1e-8)


def test_clean_and_bad_count_the_same() -> None:
    one, other = Moments.empty(1), Moments.empty(1)
    one.add(np.ones((6, 1)), np.zeros((6, 1)), np.ones(6))
    other.add(np.full((2, 1), 3.0), np.ones((2, 1)), np.ones(2))
    both = one.mixed(other)
    assert (both.weight, both.x[0], both.y[0], both.xx[0, 0]) == (1, 2, 0.5, 5)
    assert one.mixed(Moments.empty(1)).x[0] == 1


def test_separation_is_the_share_of_ordered_pairs() -> None:
    rng = np.random.default_rng(0)
    normal, abnormal = (rng.integers(*ends, 50).astype(np.float64) for ends in ((0, 9), (3, 12)))
    pairs = abnormal[:, None] - normal
    expected = ((pairs > 0) + 0.5 * (pairs == 0)).mean()
    assert auroc(normal, abnormal) == pytest.approx(expected)
    assert rise(normal, normal + 2) == pytest.approx(2 / normal.std())


def test_a_model_file_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "host.onnx"
    onnx.save(backdoored(), path)
    before = path.read_bytes()
    file = ModelFile.open(path)
    view = GraphView.of(file.skeleton)
    job = Job(file, view, locate(file.skeleton).sites, "cpu", 16, 0, "column", lambda _: None)
    fit_head_similarity(job, samples(job, CLEAN), debugging_set(job, BAD), Heads(count=1))
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", ["head-similarity", "head-alignment"])
def test_fit_patch_diff_and_verify_go_together(kind: str, tmp_path: Path) -> None:
    path, patched = tmp_path / "host.onnx", tmp_path / "patched.onnx"
    onnx.save(backdoored(), path)
    debug = {**BAD, "target": np.array(1)}
    report = atpatch_onnx.fit(path, CLEAN, tmp_path / "det.onnx", kind=kind, debug=debug, fpr=0.1)
    atpatch_onnx.patch(path, report.output, output=patched)
    assert success(patched.read_bytes(), UNSEEN) < 0.2
    found = atpatch_onnx.diff(path, patched, TEST)
    assert found.identity is True
    limit = 1.0 if kind == "head-alignment" else 0.2
    assert found.flagged_inputs <= limit * found.inputs
    assert all(check.passed for check in atpatch_onnx.verify(path, patched))
    atpatch_onnx.revert(patched, output=tmp_path / "original.onnx")
    assert (tmp_path / "original.onnx").read_bytes() == path.read_bytes()


def test_padding_changes_no_score(job: Job) -> None:
    trained = fit_head_similarity(job, samples(job, CLEAN), debugging_set(job, BAD), Heads())
    together = largest_anomaly(job, trained, samples(job, UNSEEN))
    for row in range(4):
        length = int((UNSEEN["mask"][row] == 0).sum())
        alone = {name: UNSEEN[name][row : row + 1, :length] for name in ("x", "mask")}
        found = largest_anomaly(job, trained, samples(job, alone))
        np.testing.assert_allclose(found, together[row], atol=1e-5)
    assert np.ptp(together) > 0

"""Decide first, then run again: flagged samples answer as if the columns had never been seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx.parser
import pytest
from onnx import ModelProto, TensorProto
from onnxruntime.transformers.float16 import convert_float_to_float16

from atpatch_onnx.certificate import certify
from atpatch_onnx.detector import Detector
from atpatch_onnx.errors import RefusedError
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.passes.graph_view import GraphView
from atpatch_onnx.passes.locate import locate
from atpatch_onnx.passes.redistribute import Redistribution
from atpatch_onnx.passes.rerun import plan_rerun
from atpatch_onnx.passes.splice import Splice, Strategy, Treatment
from atpatch_onnx.patching import Patch, apply, revert
from atpatch_onnx.second_run import Answer, SecondRun

from hosts import Floats, model_file, run, spliced

LENGTH, WIDTH = 5, 3


def host(tail: str = "cls = Identity (g0)", outputs: str = "float[N, 2] logits") -> ModelProto:
    """Two sites in a row and a head on the first token: `[N, 5, 3]` -> `[N, 2]`."""
    return onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        host (float[N, 5, 3] x) => ({outputs})
        <float[3, 2] head = {{1, 0, 0, 1, 1, 1}}, int64 zero = {{0}}>
        {{
            t = Transpose <perm = [0, 2, 1]> (x)
            s0 = MatMul (x, t)
            p0 = Softmax <axis = -1> (s0)
            c0 = MatMul (p0, x)
            h = Add (x, c0)
            u = Transpose <perm = [0, 2, 1]> (h)
            s1 = MatMul (h, u)
            p1 = Softmax <axis = -1> (s1)
            c1 = MatMul (p1, h)
            g = Add (h, c1)
            g0 = Gather <axis = 1> (g, zero)
            {tail}
            logits = MatMul (cls, head)
        }}
    """)


def fused() -> ModelProto:
    """The same with fused operators."""
    site = "Attention <q_num_heads = 1, kv_num_heads = 1, scale = 1.0>"
    return onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 23]>
        host (float[N, 5, 3] x) => (float[N, 2] logits)
        <float[3, 2] head = {{1, 0, 0, 1, 1, 1}}, int64 zero = {{0}}>
        {{
            c0 = {site} (x, x, x)
            h = Add (x, c0)
            c1 = {site} (h, h, h)
            g = Add (h, c1)
            g0 = Gather <axis = 1> (g, zero)
            cls = Identity (g0)
            logits = MatMul (cls, head)
        }}
    """)


def softmax(scores: np.ndarray) -> np.ndarray:
    exp = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(exp / exp.sum(axis=-1, keepdims=True))


def reference(x: np.ndarray, pruned: np.ndarray) -> np.ndarray:
    """The host in float64, with the columns `[N, 5]` hidden from every query."""
    h = x.astype(np.float64)
    for _ in range(2):
        scores = np.where(pruned[:, None], -np.inf, h @ h.transpose(0, 2, 1))
        h = h + softmax(scores) @ h
    return np.asarray(h[:, 0] @ np.array([[1, 0], [0, 1], [1, 1]]))


def intermediate(x: np.ndarray, pruned: np.ndarray) -> dict[str, np.ndarray]:
    """Values within the host in float64."""
    h = x.astype(np.float64)

    def context(value: np.ndarray) -> np.ndarray:
        scores = np.where(pruned[:, None], -np.inf, value @ value.transpose(0, 2, 1))
        return np.asarray(softmax(scores) @ value)

    c0 = context(h)
    c1 = context(h + c0)
    return {"c0": c0, "h": h + c0, "c1": c1, "g0": (h + c0 + c1)[:, 0]}


def data(count: int, loud: list[int]) -> Floats:
    rng = np.random.default_rng(0)
    x = rng.random((count, LENGTH, WIDTH), np.float32)
    x[loud, 3] = 3.0
    return {"x": x}


def mean_column(opset: int) -> ModelProto:
    """The mean of a column over queries."""
    axes = "axes = Constant <value_ints = [1, 2]> ()"
    return onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : {opset}]>
        det (float[B, H, Q, K] attention) => (float[B, 1, 1, K] anomaly)
        {{ {"" if opset < 18 else axes}
           anomaly = ReduceMean {
        "<axes = [1, 2]> (attention)" if opset < 18 else "(attention, axes)"
    } }}
    """)


def splice(
    file: ModelFile,
    sites: list[int],
    threshold: float = 0.6,
    second_run: SecondRun | None = None,
    strategy: Strategy = Strategy.RERUN,
    telemetry: bool = False,
) -> Splice:
    found = locate(file.skeleton).sites
    opset = GraphView.of(file.skeleton).opset
    detector = Detector.unsaved(mean_column(opset), threshold=threshold, second_run=second_run)
    chosen = {found[i].name: Treatment(Redistribution.PRUNE, detector) for i in sites}
    return Splice(chosen, strategy, telemetry)


@pytest.mark.parametrize("model", [host, fused])
@pytest.mark.parametrize("sites", [[0], [0, 1]])
def test_flagged_samples_answer_as_if_the_column_had_never_been_seen(
    sites: list[int], model: Callable[[], ModelProto]
) -> None:
    """Also where only one site has a detector: what it flags is pruned at both."""
    file, loud = model_file(model()), [1, 4]
    rewritten, result = spliced(file, splice(file, sites))
    feeds = data(6, loud)
    before, after = run(file, feeds)["logits"], run(rewritten, feeds)["logits"]
    pruned = np.zeros((6, LENGTH), bool)
    pruned[loud, 3] = True
    np.testing.assert_allclose(after[loud], reference(feeds["x"], pruned)[loud], atol=1e-5)
    others = [0, 2, 3, 5]
    np.testing.assert_array_equal(after[others], before[others])
    assert [outcome.site for outcome in result.patched] == [
        site.name for site in locate(file.skeleton).sites
    ]


@pytest.mark.parametrize("model", [host, fused])
def test_nothing_flagged_gives_the_same_bits_and_the_patch_comes_off(
    model: Callable[[], ModelProto],
) -> None:
    file = model_file(model())
    rewritten, _ = spliced(file, splice(file, [0, 1], threshold=1.0))
    feeds = data(4, [2])
    np.testing.assert_array_equal(run(rewritten, feeds)["logits"], run(file, feeds)["logits"])
    patched = ModelFile.from_bytes(rewritten.content(), file.path)
    assert revert(patched).content() == file.buffer


@pytest.mark.parametrize("output", ["c0", "h", "c1", "g0"])
def test_outputs_that_are_made_before_the_last_site_are_of_the_second_run_too(output: str) -> None:
    """As a cache's keys are. Whoever reads them within the model goes on reading the first run."""
    file = model_file(host(outputs=f"float[N, 2] logits, float[N, 5, 3] {output}"))
    if output == "g0":
        file = model_file(host(outputs="float[N, 2] logits, float[N, 3] g0"))
    feeds, loud = data(6, [1, 4]), [1, 4]
    rewritten, _ = spliced(file, splice(file, [0, 1]))
    before, after = run(file, feeds), run(rewritten, feeds)
    pruned = np.zeros((6, LENGTH), bool)
    pruned[loud, 3] = True
    wanted = intermediate(feeds["x"], pruned)[output]
    np.testing.assert_allclose(after[output][loud], wanted[loud], atol=1e-5)
    np.testing.assert_allclose(after["logits"], reference(feeds["x"], pruned), atol=1e-5)
    quiet = [0, 2, 3, 5]
    for name in before:
        np.testing.assert_array_equal(after[name][quiet], before[name][quiet])
    patched = ModelFile.from_bytes(rewritten.content(), file.path)
    assert [slot.old for slot in certify(file, patched).difference.renamed] == [output]
    assert revert(patched).content() == file.buffer


def half(model: ModelProto) -> ModelProto:
    """The same in float16."""
    converted: ModelProto = convert_float_to_float16(model)
    return converted


@pytest.mark.parametrize("model", [host, fused, lambda: half(host())])
def test_only_what_is_answered_so_is_flagged(model: Callable[[], ModelProto]) -> None:
    """Two loud samples: one is answered as the attacker wants. Told by an output, and in bits."""
    file, number = model_file(model()), 1
    feeds, loud = data(6, [1, 4]), np.array([1, 4])
    feeds["x"][1, 0], feeds["x"][4, 0] = (0, 2, 0), (2, 0, 0)
    narrow = GraphView.of(file.skeleton).types["x"].elem_type != TensorProto.FLOAT
    if narrow:
        feeds["x"] = feeds["x"].astype(np.float16)
    before = run(file, feeds)["logits"]
    assert before[loud].argmax(axis=1).tolist() == [number, 0]
    asked = SecondRun(answer=Answer("logits", number, otherwise=1.0))
    rewritten, result = spliced(file, splice(file, [0, 1], second_run=asked, telemetry=True))
    after = run(rewritten, feeds)
    pruned = np.zeros((6, LENGTH), bool)
    pruned[1, 3] = True
    wanted = reference(feeds["x"], pruned)[1]
    np.testing.assert_allclose(after["logits"][1], wanted, atol=2e-2 if narrow else 1e-5)
    np.testing.assert_array_equal(after["logits"][[0, 2, 3, 4, 5]], before[[0, 2, 3, 4, 5]])
    for outcome in result.patched:
        np.testing.assert_array_equal(after[outcome.flagged][:, 0, 0], pruned)
    patched = ModelFile.from_bytes(rewritten.content(), file.path)
    assert [slot.old for slot in certify(file, patched).difference.renamed] == ["logits"]
    assert revert(patched).content() == file.buffer


def test_in_flow_nobody_knows_the_answer_and_another_threshold_holds() -> None:
    file = model_file(host())
    asked = SecondRun(answer=Answer("logits", 0, otherwise=1.0))
    chosen = splice(file, [0, 1], second_run=asked, strategy=Strategy.GUARD)
    rewritten, result = spliced(file, chosen)
    assert [outcome.threshold for outcome in result.patched] == [1.0, 1.0]
    feeds = data(4, [2])
    np.testing.assert_array_equal(run(rewritten, feeds)["logits"], run(file, feeds)["logits"])
    by_hand = {n: replace(t, threshold=0.6) for n, t in chosen.treatments.items()}
    _, result = spliced(file, replace(chosen, treatments=by_hand))
    assert [outcome.threshold for outcome in result.patched] == [0.6, 0.6]


def test_columns_are_pruned_only_where_the_detector_says() -> None:
    """The first site attends to other tokens than the second, although as many."""
    file = model_file(host())
    names = [site.name for site in locate(file.skeleton).sites]
    feeds = data(6, [1, 4])
    rewritten, result = spliced(file, splice(file, [1], second_run=SecondRun((names[1],))))
    assert [outcome.site for outcome in result.patched] == [names[1]]
    after = run(rewritten, feeds)["logits"]
    x = feeds["x"].astype(np.float64)
    h = x + softmax(x @ x.transpose(0, 2, 1)) @ x
    scores = h @ h.transpose(0, 2, 1)
    scores[[1, 4], :, 3] = -np.inf
    wanted = (h + softmax(scores) @ h)[:, 0] @ np.array([[1, 0], [0, 1], [1, 1]])
    np.testing.assert_allclose(after, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (SecondRun(answer=Answer("scores", 0, 1.0)), "'scores', on which it would depend, is no"),
        (SecondRun(answer=Answer("logits", 2, 1.0)), "has no class 2 of several"),
        (SecondRun(answer=Answer("c0", 0, 1.0)), "'c0', on which it would depend, has no class"),
        (SecondRun(("nope",)), "none of the sites where columns are to be pruned"),
    ],
)
def test_what_the_model_has_not_cannot_be_asked(asked: SecondRun, words: str) -> None:
    file = model_file(host(outputs="float[N, 2] logits, float[N, 5, 3] c0"))
    with pytest.raises(RefusedError, match=words):
        spliced(file, splice(file, [0, 1], second_run=asked))


def test_detectors_that_ask_for_different_second_runs_are_refused() -> None:
    file = model_file(host())
    first = splice(file, [0], second_run=SecondRun(answer=Answer("logits", 0, 0.9)))
    same = splice(file, [1], second_run=SecondRun(answer=Answer("logits", 0, 0.8)))
    other = splice(file, [1], second_run=SecondRun(answer=Answer("logits", 1, 0.9)))
    for second, agree in ((same, True), (other, False)):
        detectors = [
            replace(each, detector=replace(each.detector, sha256=str(number)))
            for number, one in enumerate((first, second))
            for each in one.treatments.values()
            if each.detector is not None
        ]
        names = [*first.treatments, *second.treatments]
        both = replace(first, treatments=dict(zip(names, detectors, strict=True)))
        if agree:
            _, result = spliced(file, both)
            assert [outcome.answer for outcome in result.patched] == [Answer("logits", 0, 1)] * 2
        else:
            with pytest.raises(RefusedError, match="ask for different second runs"):
                spliced(file, both)


def test_what_cannot_be_run_again_says_why() -> None:
    cases = {
        "is quantised": host(
            "z = Constant <value = float {0.1}> () "
            "q = QuantizeLinear (g0, z) cls = DequantizeLinear (q, z)"
        ),
        "a subgraph reads": host(
            "yes = Constant <value = bool {1}> () "
            "cls = If (yes) <then_branch = a () => (float[N, 3] k) { k = Identity (g0) }, "
            "else_branch = b () => (float[N, 3] m) { m = Neg (g0) }>"
        ),
    }
    for words, model in cases.items():
        file = model_file(model)
        view = GraphView.of(file.skeleton)
        sites = locate(file.skeleton).sites
        assert words in str(plan_rerun(view, sites, sites))
        with pytest.raises(RefusedError, match=words):
            splice(file, [0, 1])(view, sites)


def test_every_node_behind_the_first_site_is_copied_once_and_no_other() -> None:
    file = model_file(host())
    view = GraphView.of(file.skeleton)
    sites = locate(file.skeleton).sites
    plan = plan_rerun(view, sites, sites)
    assert not isinstance(plan, str)
    copied = [view.nodes[index].output[0] for index in plan.nodes]
    assert copied == ["c0", "h", "u", "s1", "p1", "c1", "g", "g0", "cls"]
    assert list(plan.ends) == ["cls"]
    edits = splice(file, [0, 1])(view, sites).edits
    rewritten = apply(file, Patch(file.sha256, edits))
    added = len(rewritten.content()) - file.size
    assert added < 12_000


def test_maps_over_other_keys_are_left_alone() -> None:
    """Two sequences of free lengths S and T: what is flagged in one means nothing in the other."""
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        host (float[N, S, 3] x, float[N, T, 3] y) => (float[N, 3] out) <int64 zero = {0}>
        {
            t = Transpose <perm = [0, 2, 1]> (x)
            s = MatMul (x, t)
            p = Softmax <axis = -1> (s)
            c = MatMul (p, x)
            u = Transpose <perm = [0, 2, 1]> (y)
            r = MatMul (y, u)
            q = Softmax <axis = -1> (r)
            d = MatMul (q, y)
            a = Gather <axis = 1> (c, zero)
            b = Gather <axis = 1> (d, zero)
            e = Add (a, b)
            out = Identity (e)
        }
    """)
    file = model_file(model)
    view, sites = GraphView.of(file.skeleton), locate(file.skeleton).sites
    assert "same keys" in str(plan_rerun(view, sites, sites))
    plan = plan_rerun(view, sites, sites[:1])
    assert not isinstance(plan, str)
    assert plan.sites == sites[:1]

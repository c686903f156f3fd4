"""How alike heads are, against NumPy in float64, whatever padding and lengths a batch has."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from numpy.typing import NDArray
from onnx import ModelProto

from atpatch_onnx.certificate import certify
from atpatch_onnx.data import Samples
from atpatch_onnx.detector import Detector, load_detector
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.passes.graph_view import GraphView
from atpatch_onnx.passes.head_maps import SIMILARITIES, NormalSite
from atpatch_onnx.passes.head_similarity import (
    HeadNorm,
    WatchedSite,
    build_head_similarity,
    build_reading,
    build_replacement,
)
from atpatch_onnx.passes.locate import locate
from atpatch_onnx.passes.observe import Observe
from atpatch_onnx.passes.redistribute import Redistribution
from atpatch_onnx.passes.splice import Splice, Strategy, Treatment
from atpatch_onnx.patching import revert
from atpatch_onnx.probed import Probed
from atpatch_onnx.runtime import Arrays

from hosts import edited, model_file, reference, run, run_model

HEADS, KEYS = 3, 7
LENGTHS = (7, 4, 5)
Doubles = NDArray[np.float64]


def maps(side: str, causal: bool, seed: int = 0) -> tuple[NDArray[np.float32], list[slice]]:
    """Random maps `[B, H, K, K]` of inputs of `LENGTHS` padded on one side, and their tokens."""
    rng = np.random.default_rng(seed)
    found = np.zeros((len(LENGTHS), HEADS, KEYS, KEYS), np.float32)
    tokens = []
    for row, length in enumerate(LENGTHS):
        here = slice(KEYS - length, KEYS) if side == "left" else slice(0, length)
        tokens.append(here)
        seen = np.zeros((KEYS, KEYS), bool)
        seen[:, here] = True
        if causal:
            seen &= np.tri(KEYS, dtype=bool)
        scores = np.where(seen, rng.normal(0, 1.5, (HEADS, KEYS, KEYS)), -1e30)
        # A row that sees nothing gets what a softmax over equal scores gives.
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        found[row] = weights / weights.sum(axis=-1, keepdims=True)
    return found, tokens


def similarity(one: Doubles, kind: str, sinks: NDArray[np.bool_]) -> Doubles:
    """That of each head in a map `[H, Q, K]` without padding; sinks: bool `[K]`."""
    own = one * ~sinks if kind.endswith("without-sinks") else one
    flat = own.reshape(len(own), -1)
    flat = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    others = [np.delete(row, head) for head, row in enumerate(flat @ flat.T)]
    return np.array([o.max() if kind.startswith("closest") else o.mean() for o in others])


def bucket_of(length: int) -> NDArray[np.int64]:
    """First, second, interior .., last."""
    found = np.full(length, 2)
    found[:2], found[-1] = [0, 1], 3
    return found


SINKS = np.array([True, False, False, True, False])
BENIGN = np.random.default_rng(5).uniform(0.2, 2, (HEADS, 5)).astype(np.float32)
SITE = NormalSite("a", HEADS, False, True, SINKS, BENIGN)


@pytest.mark.parametrize("opset", [10, 13, 17, 21])
@pytest.mark.parametrize(("side", "causal"), [("right", False), ("left", True), ("right", True)])
def test_similarities_are_those_of_the_maps_without_padding(
    side: str, causal: bool, opset: int
) -> None:
    found, tokens = maps(side, causal)
    readings = {kind: build_reading([SITE], kind, opset, 8) for kind in SIMILARITIES}
    every = {kind: run_model(model, {"attention.a": found}) for kind, model in readings.items()}
    for row, here in enumerate(tokens):
        own = found[row, :, here, here].astype(np.float64)
        length = LENGTHS[row]
        for kind, made in every.items():
            expected = similarity(own, kind, SINKS[bucket_of(length)])
            np.testing.assert_allclose(made["similarity.a"][row], expected, atol=1e-5)
        np.testing.assert_allclose(made["columns.a"][row][:, here], own.mean(axis=1), atol=1e-6)
        np.testing.assert_array_equal(made["bucket.a"][row, here], bucket_of(length))
        assert made["count.a"][row] == length
        assert (made["bucket.a"][row] == 4).sum() == KEYS - length


def test_rows_of_another_sequence_are_all_looked_at() -> None:
    rng = np.random.default_rng(1)
    found = rng.dirichlet(np.ones(4), (2, HEADS, 9)).astype(np.float32)
    site = NormalSite("a", HEADS, True, False, np.zeros(4, bool))
    made = run_model(build_reading([site], "mean", 17, 8), {"attention.a": found})
    for row, own in enumerate(found.astype(np.float64)):
        expected = similarity(own, "mean", np.zeros(4, bool))
        np.testing.assert_allclose(made["similarity.a"][row], expected, atol=1e-5)


def watched(name: str, seed: int, groups: int, **changes: object) -> WatchedSite:
    rng = np.random.default_rng(seed)
    norm = HeadNorm(*(rng.uniform(0.1, 1, HEADS).astype(np.float32) for _ in range(3)))
    weights = rng.normal(0, 3, (HEADS, groups)).astype(np.float32)
    site = WatchedSite(replace(SITE, name=name), norm, weights, np.array([True, False, True]))
    return replace(site, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("side", "causal"), [("right", False), ("left", True)])
def test_the_decision_is_that_of_the_reference(side: str, causal: bool) -> None:
    """Sums of groups over two sites; one site goes by its own group, one by the highest."""
    kind = "closest-without-sinks"
    sites = [watched("a", 1, 2, group=1), watched("b", 2, 2)]
    pairs = {"a": maps(side, causal, 3), "b": maps(side, causal, 4)}
    feeds = {f"attention.{name}": found for name, (found, _) in pairs.items()}
    made = run_model(build_head_similarity(sites, kind, 17, 8), feeds)
    for row, length in enumerate(LENGTHS):
        sums = np.zeros(2)
        for site in sites:
            found, tokens = pairs[site.normal.name]
            here = tokens[row]
            own = found[row, :, here, here].astype(np.float64)
            s = similarity(own, kind, SINKS[bucket_of(length)])
            norm = site.norm
            whitened = (s - norm.center - norm.slope * np.log(length)) * norm.gain
            sums += whitened @ site.weights.astype(np.float64)
        score = np.maximum(sums, 0)
        shares = score / (1 + score)
        for name, share in (("a", shares[1]), ("b", shares.max())):
            expected = np.zeros((HEADS, 1, KEYS))
            expected[[0, 2], :, tokens[row]] = share
            np.testing.assert_allclose(made[f"anomaly.{name}"][row], expected, atol=1e-5)
            benign = made[f"benign.{name}"][row][:, 0, tokens[row]]
            np.testing.assert_allclose(benign, BENIGN[:, bucket_of(length)] / length, atol=1e-6)


def test_a_site_that_is_only_watched_has_no_outputs() -> None:
    sites = [watched("a", 1, 1, suspicious=np.zeros(HEADS, bool)), watched("b", 2, 1)]
    made = build_head_similarity(sites, "mean", 17, 8)
    assert [o.name for o in made.graph.output] == ["anomaly.b", "benign.b"]


@pytest.mark.parametrize("shape", [(HEADS, KEYS), (HEADS, KEYS, KEYS)])
def test_absolute_positions_have_a_benign_column_or_map(shape: tuple[int, ...]) -> None:
    benign = np.random.default_rng(0).uniform(0, 1, shape).astype(np.float32)
    normal = NormalSite("a", HEADS, False, False, np.eye(KEYS, dtype=bool)[0], benign)
    model = build_head_similarity([watched("a", 1, 1, normal=normal)], "mean", 17, 8)
    found = maps("right", False)[0]
    made = run_model(model, {"attention.a": found})["benign.a"]
    np.testing.assert_array_equal(made[0], benign if benign.ndim == 3 else benign[:, None])


def test_a_batch_of_mixed_lengths_is_what_single_runs_are() -> None:
    for side, causal in (("right", False), ("left", True)):
        found, tokens = maps(side, causal)
        model = build_head_similarity([watched("a", 1, 1)], "closest-without-sinks", 17, 8)
        together = run_model(model, {"attention.a": found})["anomaly.a"]
        for row, here in enumerate(tokens):
            alone = run_model(model, {"attention.a": found[row : row + 1, :, here, here]})
            np.testing.assert_allclose(together[row][..., here], alone["anomaly.a"][0], atol=1e-6)


def test_named_heads_alone_are_replaced() -> None:
    found = maps("right", False)[0]
    heads = np.zeros((len(LENGTHS), 2, HEADS + 1), np.float32)
    heads[1, 1, 2] = 1
    model = build_replacement(SITE, 1, 2, 17, 8)
    made = run_model(model, {"attention": found, "heads": heads})
    np.testing.assert_array_equal(made["anomaly"][..., 0, 0], heads[:, 1, :HEADS])
    assert made["benign"].shape == (len(LENGTHS), HEADS, 1, KEYS)


NAMES = ("attention.0", "attention.1")


def host() -> ModelProto:
    """Two sites in a row, of two heads that attend to the same 6 tokens."""
    return onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        host (float[B, 2, 6, 4] x) => (float[B, 2, 6, 4] y)
        {
            t0 = Transpose <perm = [0, 1, 3, 2]> (x)
            s0 = MatMul (x, t0)
            p0 = Softmax <axis = -1> (s0)
            c0 = MatMul (p0, x)
            h = Add (x, c0)
            t1 = Transpose <perm = [0, 1, 3, 2]> (h)
            s1 = MatMul (h, t1)
            p1 = Softmax <axis = -1> (s1)
            c1 = MatMul (p1, h)
            z = Add (h, c1)
            y = Neg (z)
        }
    """)


def saved(model: ModelProto, path: Path, threshold: float, applied: list[str]) -> Detector:
    metadata = {
        "atpatch.abi": "1",
        "atpatch.scope": "model",
        "atpatch.threshold": str(threshold),
        "atpatch.apply": json.dumps(applied),
    }
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return load_detector(path, 17)


def two_heads(name: str, suspicious: list[bool]) -> WatchedSite:
    """A site of the host, whose similarity itself is the score."""
    ones, zeros = np.ones(2, np.float32), np.zeros(2, np.float32)
    benign = np.full((2, 6), 1 / 6, np.float32)
    normal = NormalSite(name, 2, False, False, np.zeros(6, bool), benign)
    norm = HeadNorm(zeros, zeros, ones)
    weights = np.full((2, 1), 0.25, np.float32)
    return WatchedSite(normal, norm, weights, np.array(suspicious))


@pytest.mark.parametrize("strategy", [Strategy.GUARD, Strategy.SELECT, Strategy.RERUN])
def test_unflagged_samples_keep_their_bits_and_flagged_ones_get_benign_heads(
    strategy: Strategy, tmp_path: Path
) -> None:
    """Applied at the last site in flow; with a second run at the first one."""
    place = 0 if strategy is Strategy.RERUN else 1
    sites = [two_heads(name, [False, index == place]) for index, name in enumerate(NAMES)]
    model = build_head_similarity(sites, "mean", 17, 8)
    file = model_file(host())
    view, located = GraphView.of(file.skeleton), locate(file.skeleton).sites
    x = 0.6 * np.random.default_rng(2).standard_normal((6, 2, 6, 4), np.float32)
    feeds: Arrays = {"x": x}
    edits, outputs = Observe(saved(model, tmp_path / "0.onnx", 0.5, []))(view, located)
    wanted = outputs[f"anomaly.{NAMES[place]}"]
    probed = Probed(file, edits, "cpu").over(Samples(feeds, 6), [wanted], 6, lambda _: None)
    scores = next(probed)[wanted].reshape(6, -1).max(axis=1)
    threshold = float(np.sort(scores)[2:4].mean())
    detector = saved(model, tmp_path / "1.onnx", threshold, [NAMES[place]])
    treatment = Treatment(Redistribution.BENIGN, detector)
    result = Splice({NAMES[place]: treatment}, strategy)(view, located)
    patched = edited(file, result.edits)
    before, after = run(file, feeds)["y"], run(patched, feeds)["y"]
    expected = heads_replaced(x, place)
    for row, score in enumerate(scores):
        if score > threshold:
            np.testing.assert_allclose(after[row], expected[row], atol=1e-5)
            assert not np.array_equal(after[row], before[row])
        else:
            np.testing.assert_array_equal(after[row], before[row])
    assert revert(ModelFile.from_bytes(patched.content())).content() == bytes(file.buffer)
    certify(file, ModelFile.from_bytes(patched.content()))


def heads_replaced(x: NDArray[np.float32], place: int) -> Doubles:
    """The host's output in float64 with the second head of one site replaced by the uniform map."""
    h = x.astype(np.float64)
    for index in range(2):
        scores = h @ h.swapaxes(-1, -2)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        p = weights / weights.sum(axis=-1, keepdims=True)
        if index == place:
            flagged = np.array([False, True])[None, :, None, None]
            p = reference(p, flagged, np.full((1, 1, 1, 6), 1 / 6))
        h = h + p @ h
    return -h

"""Repairs behind P V: what comes out, who reads it, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from numpy.typing import NDArray
from onnx import ModelProto

import atpatch_onnx
from atpatch_onnx.attention import read_attention
from atpatch_onnx.certificate import certify, verify
from atpatch_onnx.data import Samples
from atpatch_onnx.detector import Detector, load_detector
from atpatch_onnx.diffing import FlagReader
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.passes.align import REPAIRED, Align, read_contexts
from atpatch_onnx.passes.graph_view import GraphView
from atpatch_onnx.passes.head_repair import Correction, build_head_repair
from atpatch_onnx.passes.locate import locate
from atpatch_onnx.passes.outcome import PassResult, Skipped
from atpatch_onnx.patching import Rewritten, about_edit, revert
from atpatch_onnx.probed import Probed
from atpatch_onnx.runtime import Arrays

from forms import SCOPES, form
from hosts import assert_patch, attention, edited, model_file, random_feeds, run, run_model

NAMES = ("attention.0", "attention.1")
Doubles = NDArray[np.float64]


def correction(heads: list[bool], size: int = 4, rank: int = 2, seed: int = 0) -> Correction:
    rng = np.random.default_rng(seed)
    u, v = (0.5 * rng.standard_normal((len(heads), size, rank)) for _ in range(2))
    bias = rng.standard_normal((len(heads), size))
    mask = np.array(heads)[:, None]
    parts = (u * mask[..., None], v * mask[..., None], bias * mask)
    return Correction(*(part.astype(np.float32) for part in parts))


CORRECTIONS = (correction([False, True]), correction([True, True], rank=1, seed=1))


def repair(
    folder: Path,
    corrections: tuple[Correction, ...] = CORRECTIONS,
    opset: int = 17,
    names: tuple[str, ...] = NAMES,
) -> Detector:
    """A repair of these sites."""
    model = build_head_repair(corrections, opset, 8)
    repaired = {
        name: {"heads": np.flatnonzero(c.heads).tolist(), "of": len(c.heads)}
        for name, c in zip(names, corrections, strict=True)
    }
    metadata = {
        "atpatch.abi": "1",
        "atpatch.scope": "context",
        "atpatch.kind": "head-alignment",
        "atpatch.sites": json.dumps(list(repaired)),
        "atpatch.training": json.dumps({REPAIRED: repaired}),
    }
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, folder / "repair.onnx")
    return load_detector(folder / "repair.onnx", opset)


def aligned(file: ModelFile, align: Align) -> tuple[Rewritten, PassResult]:
    """The host with the pass applied, and with what it says of itself, as `patch` adds it."""
    result = align(GraphView.of(file.skeleton), locate(file.skeleton).sites)
    sites = [{"site": o.site, "flagged": o.flagged, "strategy": o.strategy} for o in result.patched]
    about = about_edit(file, {"sites": sites, "detectors": []})
    return edited(file, (*result.edits, about)), result


def corrected(feeds: Arrays, corrections: tuple[Correction, ...]) -> Doubles:
    """The output of `hosts.attention` in float64 with corrected contexts."""
    q, k, v, mask = (feeds[name].astype(np.float64) for name in ("q", "k", "v", "mask"))
    for one in corrections:
        scores = q @ k.swapaxes(-1, -2) + mask
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        context = weights / weights.sum(axis=-1, keepdims=True) @ v
        u, w, b = (value.astype(np.float64) for value in (one.u, one.v, one.bias))
        q = context.copy()
        for head in range(context.shape[1]):
            code = sum(context[:, h] @ w[h] for h in range(context.shape[1]))
            q[:, head] += code @ u[head].T + b[head]
    return np.asarray(q)


@pytest.mark.parametrize("opset", [9, 13, 17, 21])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float", 1e-5), ("float16", 2e-2)])
def test_contexts_are_corrected_and_all_else_is_as_it_was(
    opset: int, dtype: str, tolerance: float, tmp_path: Path
) -> None:
    file = model_file(attention(opset, dtype))
    patched, result = aligned(file, Align(dict.fromkeys(NAMES, repair(tmp_path, opset=opset))))
    assert [o.strategy for o in result.patched] == ["always", "always"]
    feeds = random_feeds(dtype)
    found = run(patched, feeds)["y"]
    assert found.dtype == feeds["q"].dtype
    np.testing.assert_allclose(found, corrected(feeds, CORRECTIONS), atol=tolerance, rtol=tolerance)
    # One output of each product got another name, and no input slot was rewired.
    assert_patch(file, patched, rewired=0)
    assert revert(ModelFile.from_bytes(patched.content())).content() == bytes(file.buffer)
    base, after = file, ModelFile.from_bytes(patched.content(), "after.onnx")
    certificate = certify(base, after)
    assert all(check.passed for check in verify(base, after, certificate.as_dict()))


def test_the_array_form_is_what_the_nodes_do() -> None:
    context = np.random.default_rng(0).standard_normal((2, 2, 5, 4)).astype(np.float32)
    model = build_head_repair(CORRECTIONS, 17, 8)
    for index, one in enumerate(CORRECTIONS):
        made = run_model(model, {"context": context, "layer": np.array(index)})["corrected"]
        np.testing.assert_allclose(made, one(context), atol=1e-6)
    # A head that is not repaired keeps its bits.
    np.testing.assert_array_equal(
        run_model(model, {"context": context, "layer": np.array(0)})["corrected"][:, 0],
        context[:, 0],
    )


def test_one_site_alone_can_be_repaired(tmp_path: Path) -> None:
    file = model_file(attention())
    patched, result = aligned(file, Align({NAMES[1]: repair(tmp_path)}))
    assert isinstance(result.outcomes[0], Skipped)
    u, bias = CORRECTIONS[0].u, CORRECTIONS[0].bias
    nothing = Correction(0 * u, 0 * u, 0 * bias)
    feeds = random_feeds()
    expected = corrected(feeds, (nothing, CORRECTIONS[1]))
    np.testing.assert_allclose(run(patched, feeds)["y"], expected, atol=1e-5)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_context_is_corrected_wherever_it_lies(scope: str, tmp_path: Path) -> None:
    file = model_file(form(scope, "plain"))
    (site,) = locate(file.skeleton).sites
    one = CORRECTIONS[0]
    detector = repair(tmp_path, (one,), 23, (site.name,))
    patched, result = aligned(file, Align({site.name: detector}))
    assert [o.site for o in result.patched] == [site.name]
    feeds = random_feeds()
    feeds |= {"mask": np.repeat(feeds["mask"], 6, axis=2), "flag": np.array(True)}
    halved = {**feeds, "q": 0.5 * feeds["q"]}
    np.testing.assert_allclose(run(patched, feeds)["y"], corrected(halved, (one,)), atol=1e-5)
    assert revert(ModelFile.from_bytes(patched.content())).content() == bytes(file.buffer)


def joined_heads() -> ModelProto:
    """Heads are joined with the batch, `[B*2, L, L]`, as torch.bmm exports do; a branch reads the
    context."""
    return onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        host (float[B, L, 8] x, bool negate) => (float[B, L, 8] y)
        <int64[4] apart = {0, 0, 2, 4}, int64[3] heads = {-1, 0, 4}, int64[4] back = {-1, 2, 0, 4},
         int64[3] whole = {0, 0, 8}>
        {
            x4 = Reshape (x, apart)
            xt = Transpose <perm = [0, 2, 1, 3]> (x4)
            shape = Shape (x)
            zero = Constant <value = int64[1] {0}> ()
            two = Constant <value = int64[1] {2}> ()
            one = Constant <value = int64[1] {1}> ()
            four = Constant <value = int64[1] {4}> ()
            batch = Slice (shape, zero, one)
            length = Slice (shape, one, two)
            rows = Mul (batch, two)
            joined = Concat <axis = 0> (rows, length, four)
            h = Reshape (xt, joined)
            k = Transpose <perm = [0, 2, 1]> (h)
            s = MatMul (h, k)
            p = Softmax <axis = -1> (s)
            c = MatMul (p, h)
            d = If (negate) <
                then_branch = yes () => (float[N, L, 4] n) { n = Neg (c) },
                else_branch = no () => (float[N, L, 4] m) { m = Identity (c) }
            >
            split = Concat <axis = 0> (batch, two, length, four)
            e = Reshape (d, split)
            f = Transpose <perm = [0, 2, 1, 3]> (e)
            y = Reshape (f, whole)
        }
    """)


@pytest.mark.parametrize("negate", [False, True])
def test_joined_heads_and_readers_in_branches(negate: bool, tmp_path: Path) -> None:
    file = model_file(joined_heads())
    sites = locate(file.skeleton).sites
    assert [(site.rank, site.facts.heads) for site in sites] == [(3, 2)]
    one = (CORRECTIONS[0],)
    patched, result = aligned(
        file, Align({"attention": repair(tmp_path, one, names=("attention",))})
    )
    x = np.random.default_rng(0).standard_normal((3, 5, 8)).astype(np.float32)
    heads = x.reshape(3, 5, 2, 4).transpose(0, 2, 1, 3)
    feeds: Arrays = {"q": heads, "k": heads, "v": heads, "mask": np.zeros((1, 1, 1, 5))}
    expected = corrected(feeds, one).transpose(0, 2, 1, 3).reshape(3, 5, 8)
    found = run(patched, {"x": x, "negate": np.array(negate)})["y"]
    np.testing.assert_allclose(found, -expected if negate else expected, atol=1e-5)
    assert result.patched


def test_a_fused_operator_is_left_alone_and_says_what_to_do(tmp_path: Path) -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 23]>
        host (float[B, 2, L, 4] x) => (float[B, 2, L, 4] y) { y = Attention (x, x, x) }
    """)
    file = model_file(model)
    view, sites = GraphView.of(file.skeleton), locate(file.skeleton).sites
    detector = repair(tmp_path, CORRECTIONS[:1], 23, ("attention",))
    result = Align({"attention": detector})(view, sites)
    (outcome,) = result.outcomes
    assert isinstance(outcome, Skipped)
    assert "Attention" in outcome.reason
    assert "choose other sites" in outcome.reason
    assert not [e for e in result.edits if type(e).__name__ != "AddInitializer"]


def test_every_input_counts_as_changed_at_the_corrected_heads(tmp_path: Path) -> None:
    """So that `diff` does not take a repair for a patch that lost its identity."""
    file = model_file(attention(), tmp_path / "host.onnx")
    file.path.write_bytes(bytes(file.buffer))
    patched, _ = aligned(file, Align(dict.fromkeys(NAMES, repair(tmp_path))))
    path = tmp_path / "patched.onnx"
    path.write_bytes(patched.content())
    feeds = random_feeds(batch=4)
    found = atpatch_onnx.diff(file.path, path, feeds, batch=3)
    assert found.identity is True
    assert found.flagged_inputs == 4
    assert [site.inputs for site in found.sites] == [4, 4]
    reader = FlagReader(ModelFile.open(path), "cpu")
    samples = Samples(feeds, 4)
    columns = reader.columns(next(samples.batches(4)))
    assert [c.shape for c in columns] == [(4, 6), (4, 6)]
    maps = read_attention(file, ModelFile.open(path), samples, "cpu")
    assert [site.flagged.all() for site in maps[0]] == [True, True]


def test_contexts_can_be_read() -> None:
    file = model_file(attention())
    edits, names = read_contexts(GraphView.of(file.skeleton), locate(file.skeleton).sites)
    feeds = random_feeds()
    wanted = [name for pair in names.values() for name in pair]
    made = next(Probed(file, edits, "cpu").over(Samples(feeds, 3), wanted, 3, lambda _: None))
    context, keys = (made[name][:, 0] for name in names[NAMES[1]])
    np.testing.assert_allclose(context, run(file, feeds)["y"], atol=1e-6)
    np.testing.assert_array_equal(keys[:, 0, 0], feeds["mask"][:, 0, 0] == 0)

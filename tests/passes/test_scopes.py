"""Attention in every form and every scope is a site: what is not flagged keeps its bits, what is
flagged is redistributed as the reference says, and the file says exactly what was changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto

from atpatch_onnx.comparing import compare
from atpatch_onnx.detector import Detector, load_detector
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.passes.graph_view import GraphView
from atpatch_onnx.passes.locate import locate
from atpatch_onnx.passes.probe import Probe
from atpatch_onnx.passes.redistribute import Redistribution
from atpatch_onnx.passes.splice import Splice, Strategy, Treatment
from atpatch_onnx.patch_file import load_patch, save_patch
from atpatch_onnx.patching import Patch, apply, revert

from forms import BODIES, FUNCTION, SCOPES, form, host
from hosts import COLUMN_MEAN_18, detector, edited, model_file, random_feeds, reference, run
from hosts import spliced as splice_all

FORMS = [(scope, body) for scope in SCOPES for body in BODIES]


def feeds(flag: bool = True, seed: int = 0) -> dict[str, NDArray[np.generic]]:
    found = random_feeds(seed=seed)
    mask = np.repeat(found["mask"], found["mask"].shape[-1], axis=2)
    return {**found, "mask": mask, "flag": np.array(flag)}


def probabilities(f: dict[str, NDArray[np.generic]]) -> NDArray[np.float64]:
    q, k, mask = (np.asarray(f[n], np.float64) for n in ("q", "k", "mask"))
    scores = q @ k.swapaxes(-1, -2) * 0.5 + mask
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def load(tmp_path: Path, threshold: float, **metadata: str) -> Detector:
    model = detector(COLUMN_MEAN_18, opset=23, threshold=threshold, **metadata)
    onnx.save(model, tmp_path / "det.onnx")
    return load_detector(tmp_path / "det.onnx", 23)


def pruning(model: ModelProto, found: Detector, **options: object) -> Splice:
    sites = locate(model_file(model).skeleton).sites
    treatment = Treatment(Redistribution.PRUNE, found)
    return Splice({s.name: treatment for s in sites}, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", [Strategy.GUARD, Strategy.SELECT])
@pytest.mark.parametrize(("scope", "body"), FORMS)
def test_unflagged_samples_keep_their_bits_and_flagged_ones_are_pruned(
    scope: str, body: str, strategy: Strategy, tmp_path: Path
) -> None:
    model = form(scope, body)
    file = model_file(model)
    f = feeds()
    p = probabilities(f)
    means = p.mean(axis=(1, 2))  # [B, K]
    largest = np.sort(means.max(axis=1))
    threshold = float((largest[-1] + largest[-2]) / 2)  # one sample is above
    flagged = (means > threshold)[:, None, None]
    found = load(tmp_path, threshold)

    patched, result = splice_all(file, pruning(model, found, strategy=strategy))

    assert len(result.patched) == 1
    onnx.checker.check_model(patched.content())
    original, new = run(file, f)["y"], run(patched, f)["y"]
    quiet = ~flagged.any(axis=(1, 2, 3))
    assert quiet.sum() == 2
    np.testing.assert_array_equal(new[quiet], original[quiet])
    wanted = reference(p, flagged, None) @ np.asarray(f["v"], np.float64)
    np.testing.assert_allclose(new[~quiet], wanted[~quiet], atol=1e-5)
    assert np.abs(new[~quiet] - original[~quiet]).max() > 1e-3
    # The other branch is not touched.
    off = feeds(flag=False)
    if "branch" in scope:
        np.testing.assert_array_equal(run(patched, off)["y"], run(file, off)["y"])


@pytest.mark.parametrize(("scope", "body"), FORMS)
def test_the_patch_can_be_saved_proved_and_undone(scope: str, body: str, tmp_path: Path) -> None:
    model = form(scope, body)
    file = model_file(model)
    patched, result = splice_all(file, pruning(model, load(tmp_path, 0.5)))

    result_file = ModelFile.from_bytes(patched.content())
    assert revert(result_file).content() == bytes(file.buffer)
    found = compare(file, result_file)
    in_function = "function" in scope
    assert len(found.removed_nodes) == in_function
    assert len(found.rewired) == (body == "plain" and not in_function)
    assert len(found.renamed) == (body != "plain" and not in_function)
    assert all(name.startswith("atpatch/") for name in found.inserted_nodes)
    written = tmp_path / "fix.atpatch"
    patch = Patch(file.sha256, result.edits)
    written.write_bytes(save_patch(patch, file))
    assert apply(file, load_patch(written)).content() == patched.content()


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("scope", [s for s in SCOPES if s != "loop"])
def test_features_and_flags_of_every_scope_can_be_read(
    scope: str, body: str, tmp_path: Path
) -> None:
    model = form(scope, body)
    file = model_file(model)
    view, sites = GraphView.of(file.skeleton), locate(file.skeleton).sites
    f = feeds()
    wanted = probabilities(f)

    edits, features, maps = Probe(maps="whole")(view, sites)
    found = run(edited(file, tuple(edits)), f)
    site = sites[0].name
    np.testing.assert_allclose(found[maps[site]], wanted, atol=1e-6)
    np.testing.assert_allclose(found[features[site].columns], wanted.mean(axis=2), atol=1e-6)
    if "branch" in scope:
        assert run(edited(file, tuple(edits)), feeds(flag=False))[maps[site]].size == 0

    patched, result = splice_all(file, pruning(model, load(tmp_path, 0.2), telemetry=True))
    flags = run(patched, f)[result.patched[0].flagged]
    np.testing.assert_array_equal(flags[:, 0, 0], wanted.mean(axis=(1, 2)) > 0.2)


@pytest.mark.parametrize("body", BODIES)
def test_other_calls_of_a_function_stay_calls(body: str, tmp_path: Path) -> None:
    model = host(
        """
        a = local.attend (q, k, v, mask)
        b = local.attend (a, k, v, mask)
        y = local.attend (b, k, v, mask)
        """,
        FUNCTION.format(name="attend", body=BODIES[body].format(out="c")),
    )
    file = model_file(model)
    sites = locate(file.skeleton).sites
    assert len({site.name for site in sites}) == 3
    treatment = Treatment(Redistribution.PRUNE, load(tmp_path, 1.0))
    patched, _ = splice_all(file, Splice({sites[1].name: treatment}))
    nodes = ModelFile.from_bytes(patched.content()).skeleton.graph.node
    assert [n.output[0] for n in nodes if n.op_type == "attend"] == ["a", "y"]
    f = feeds()
    np.testing.assert_array_equal(run(patched, f)["y"], run(file, f)["y"])


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("strategy", [Strategy.GUARD, Strategy.SELECT])
def test_a_detector_may_see_a_few_rows_only(body: str, strategy: Strategy, tmp_path: Path) -> None:
    model = form("main", body)
    file = model_file(model)
    f = feeds()
    p = probabilities(f)
    means = p[:, :, [0, 2, 5]].mean(axis=(1, 2))
    flagged = (means > 0.25)[:, None, None]
    assert 0 < flagged.sum() < flagged.size
    found = load(tmp_path, 0.25, **{"atpatch.rows": "3"})
    patched, _ = splice_all(file, pruning(model, found, strategy=strategy, telemetry=True))
    out = run(patched, f)
    np.testing.assert_array_equal(out["atpatch/attention/flagged"], flagged)
    wanted = reference(p, flagged, None) @ np.asarray(f["v"], np.float64)
    np.testing.assert_allclose(out["y"], wanted, atol=1e-5)

"""Fitting: features are what NumPy says, statistics are streamed, the budget holds on unseen
inputs, and an over-attended column is found without having been seen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import ModelProto

import atpatch_onnx
from atpatch_onnx.errors import InputError
from atpatch_onnx.fitting import FitReport
from atpatch_onnx.fitting.calibration import Calibration, calibrate
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.passes.features import FIRST, FLOOR, HIDDEN, INTERIOR, LAST, RICH, SECOND
from atpatch_onnx.passes.graph_view import GraphView
from atpatch_onnx.passes.locate import locate
from atpatch_onnx.passes.probe import Probe

from hosts import (
    attention,
    edited,
    model_file,
    over_attending,
    random_feeds,
    run,
    save_arrays,
    tokens,
)


def save(folder: Path, model: ModelProto, data: Mapping[str, Any]) -> tuple[Path, Path]:
    onnx.save(model, folder / "host.onnx")
    save_arrays(folder / "clean.npz", data)
    return folder / "host.onnx", folder / "clean.npz"


def calibrated(report: FitReport) -> Calibration:
    assert report.calibration is not None
    return report.calibration


@pytest.mark.parametrize("opset", [9, 11, 13, 18])
def test_features_are_what_numpy_says(opset: int) -> None:
    file = model_file(attention(opset))
    sites = locate(file.skeleton).sites
    edits, features, maps = Probe(RICH, maps="whole")(GraphView.of(file.skeleton), sites)
    values = run(edited(file, tuple(edits)), random_feeds(batch=3))
    for site in sites:
        found, p = features[site.name], values[maps[site.name]]
        columns = p.mean(axis=2)
        np.testing.assert_allclose(values[found.columns], columns, atol=1e-6)
        seen = columns.mean(axis=1) > 0
        count = seen.sum(axis=1)[:, None, None]
        rows = [columns.mean(1), columns.max(1), p[:, :, 0].mean(1), p[:, :, -1].mean(1)]
        rows += [columns.min(1), p[:, :, 0].max(1), p[:, :, 0].min(1)]
        rows += [p[:, :, -1].max(1), p[:, :, -1].min(1), p.max(2).mean(1), p.min(2).mean(1)]
        wanted = np.log(np.maximum(np.stack(rows, 1) * np.sqrt(count), FLOOR))
        np.testing.assert_allclose(values[found.features], wanted, atol=1e-4)
        assert values[found.bucket][0].tolist() == [FIRST, SECOND, *[INTERIOR] * 3, LAST]
        assert values[found.bucket][2].tolist() == [FIRST, SECOND, INTERIOR, LAST, HIDDEN, HIDDEN]


@pytest.mark.parametrize(
    ("fixed", "padded", "opset"),
    [(True, False, 17), (False, False, 17), (False, True, 11), (True, True, 9)],
)
def test_the_budget_holds_on_unseen_inputs_and_a_trigger_is_found(
    fixed: bool, padded: bool, opset: int, tmp_path: Path
) -> None:
    model, data = save(tmp_path, over_attending(fixed, opset), tokens(4000, 0, padded=padded))
    report = atpatch_onnx.fit(model, data, tmp_path / "det.onnx", fpr=0.05)
    record = json.loads(ModelFile.open(report.output).metadata("atpatch.training") or "")
    assert record["positions"] == ("absolute" if fixed and not padded else "buckets")
    assert calibrated(report).honoured
    patched = atpatch_onnx.patch(model, report.output, redistribute="benign").output
    unseen = tokens(2000, 1, padded=padded)
    bad = {name: array[:200].copy() for name, array in unseen.items()}
    bad["x"][:, 2, 0] = 6
    flagged = {}
    for name, arrays in (("unseen", unseen), ("bad", bad)):
        save_arrays(tmp_path / f"{name}.npz", arrays)
        flagged[name] = atpatch_onnx.diff(model, patched, tmp_path / f"{name}.npz")
        assert flagged[name].identity is True
    # 1,200 held-out and 2,000 unseen inputs: 2.5 points are three standard deviations.
    assert flagged["unseen"].flagged_inputs / 2000 < 0.075
    assert flagged["bad"].flagged_inputs / 200 > 0.9
    assert max(flagged["bad"].sites[0].columns.items(), key=lambda item: item[1])[0] == 2


def test_the_threshold_is_a_conformal_quantile() -> None:
    rng = np.random.default_rng(0)
    flagged = []
    for _ in range(300):
        held_out, unseen = rng.random(199), rng.random(1000)
        flagged.append((unseen > calibrate(held_out, 0.05, 0).threshold).mean())
    assert abs(np.mean(flagged) - 0.05) < 0.005


@pytest.mark.parametrize(
    ("count", "budget", "above", "honoured"),
    [(175, 0.01, 1, True), (1000, 0.01, 9, True), (60, 0.01, 0, False), (10, 0.97, 9, True)],
)
def test_the_threshold_is_the_rank_next_to_the_budget(
    count: int, budget: float, above: int, honoured: bool
) -> None:
    anomalies = np.random.default_rng(0).permutation(count) / count
    found = calibrate(anomalies, budget, 0)
    assert int((anomalies > found.threshold).sum()) == found.flagged.hits == above
    assert found.expected_fpr == pytest.approx((above + 1) / (count + 1))
    assert found.honoured is honoured


def test_too_few_inputs_are_said_not_hidden(tmp_path: Path) -> None:
    model, data = save(tmp_path, over_attending(True), tokens(60, 0))
    report = atpatch_onnx.fit(model, data, tmp_path / "det.onnx", fpr=0.01)
    assert not calibrated(report).honoured
    assert calibrated(report).expected_fpr > 0.01
    save_arrays(data, tokens(10, 0))
    with pytest.raises(InputError, match="at least 20"):
        atpatch_onnx.fit(model, data, tmp_path / "other.onnx")
    assert not (tmp_path / "other.onnx").exists()


def test_batch_size_and_padding_of_batches_do_not_change_the_detector(tmp_path: Path) -> None:
    model, data = save(tmp_path, over_attending(True), tokens(100, 0))
    one = atpatch_onnx.fit(model, data, tmp_path / "a.onnx", batch=7)
    two = atpatch_onnx.fit(model, data, tmp_path / "b.onnx", batch=64)
    assert calibrated(one).threshold == pytest.approx(calibrated(two).threshold, rel=1e-5)
    fixed = over_attending(True)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 16
    fixed.graph.input[1].type.tensor_type.shape.dim[0].dim_value = 16
    fixed.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 16
    onnx.save(fixed, model)
    three = atpatch_onnx.fit(model, data, tmp_path / "c.onnx")
    assert calibrated(one).threshold == pytest.approx(calibrated(three).threshold, rel=1e-5)


@pytest.mark.parametrize("fixed", [True, False])
def test_sites_of_different_sizes_share_one_detector(fixed: bool, tmp_path: Path) -> None:
    """Two sites, of 2 heads over 6 keys and of 1 head over 4; positions or buckets."""
    long, short = ("6", "4") if fixed else ("L", "M")
    model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        host (float[N, 2, {long}, 4] q, float[N, 1, {short}, 4] r)
            => (float[N, 2, {long}, 4] y, float[N, 1, {short}, 4] z)
        {{
            k = Transpose <perm = [0, 1, 3, 2]> (q)
            s = MatMul (q, k)
            p = Softmax <axis = -1> (s)
            y = MatMul (p, q)
            rt = Transpose <perm = [0, 1, 3, 2]> (r)
            t = MatMul (r, rt)
            u = Softmax <axis = -1> (t)
            z = MatMul (u, r)
        }}
    """)
    rng = np.random.default_rng(0)
    shapes = {"q": (2, 6, 4), "r": (1, 4, 4)}
    data = {name: rng.standard_normal((200, *shape), np.float32) for name, shape in shapes.items()}
    path, arrays = save(tmp_path, model, data)
    report = atpatch_onnx.fit(path, arrays, tmp_path / "det.onnx", fpr=0.05)
    patched = atpatch_onnx.patch(path, report.output, telemetry=True).output
    loud = {name: 5 * array for name, array in data.items()}
    found = atpatch_onnx.diff(path, patched, save_arrays(tmp_path / "loud.npz", loud))
    assert found.identity is True
    assert all(site.inputs for site in found.sites)


@pytest.mark.parametrize("free", [True, False])
def test_models_with_the_sequence_first_get_samples_and_not_positions(
    free: bool, tmp_path: Path
) -> None:
    """`[L, B, E]` in and out, as `batch_first=False` exports: the data is sample by sample."""
    length = "L" if free else "8"
    model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        host (float[{length}, B, 4] x) => (float[{length}, B, 4] y) {{
            q = Transpose <perm = [1, 0, 2]> (x)
            k = Transpose <perm = [1, 2, 0]> (x)
            s = MatMul (q, k)
            p = Softmax <axis = -1> (s)
            c = MatMul (p, q)
            y = Transpose <perm = [1, 0, 2]> (c)
        }}
    """)
    onnx.save(model, tmp_path / "host.onnx")
    data = {"x": tokens(600, 0)["x"]}
    report = atpatch_onnx.fit(tmp_path / "host.onnx", data, tmp_path / "det.onnx", fpr=0.05)
    patched = atpatch_onnx.patch(tmp_path / "host.onnx", report.output).output
    assert calibrated(report).calibration_inputs + calibrated(report).fit_inputs == 600
    unseen = {"x": tokens(600, 1)["x"]}
    unseen["x"][:100, 2, 0] = 6
    found = atpatch_onnx.diff(tmp_path / "host.onnx", patched, unseen)
    assert found.inputs == found.outputs[0].samples == 600
    assert found.identity is True
    assert 95 <= found.flagged_inputs <= 160
    wrong = np.moveaxis(data["x"], 0, 1)[:, :, None]
    with pytest.raises(InputError, match="one sample an entry of axis 0"):
        atpatch_onnx.fit(tmp_path / "host.onnx", {"x": wrong}, tmp_path / "other.onnx")

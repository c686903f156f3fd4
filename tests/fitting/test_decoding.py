"""Detectors for decoding: one query row, a cache longer than any in fitting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from numpy.typing import NDArray

from atpatch_onnx import api
from atpatch_onnx.fitting import fit
from atpatch_onnx.model_file import ModelFile

from hosts import run, save_arrays

Floats = dict[str, NDArray[np.float32]]

BODIES = {
    "plain": """
        kt = Transpose <perm = [0, 1, 3, 2]> (keys)
        s = MatMul (q, kt)
        p = Softmax <axis = -1> (s)
        y = MatMul (p, values)
    """,
    "fused": "y = Attention <scale = 1.0> (q, keys, values)",
}


def write_decoder(path: Path, body: str) -> Path:
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 23]>
        host (float[B, 2, 1, 4] q, float[B, 2, 1, 4] k, float[B, 2, 1, 4] v,
              float[B, 2, P, 4] past_k, float[B, 2, P, 4] past_v) => (float[B, 2, 1, 4] y)
        {{
            keys = Concat <axis = 2> (past_k, k)
            values = Concat <axis = 2> (past_v, v)
            {BODIES[body]}
        }}
    """)
    onnx.save(model, path)
    return path


def steps(count: int, past: int, seed: int) -> Floats:
    rng = np.random.default_rng(seed)
    lengths = dict.fromkeys("qkv", 1) | {"past_k": past, "past_v": past}
    return {
        n: 0.5 * rng.standard_normal((count, 2, length, 4), np.float32)
        for n, length in lengths.items()
    }


@pytest.mark.parametrize("benign", ["column", "uniform"])
@pytest.mark.parametrize("body", BODIES)
def test_a_detector_of_decode_steps_holds_for_longer_caches(
    body: str, benign: str, tmp_path: Path
) -> None:
    model = write_decoder(tmp_path / "model.onnx", body)
    data = save_arrays(tmp_path / "clean.npz", steps(400, 9, seed=0))
    report = fit(model, data, tmp_path / "det.onnx", benign=benign, fpr=0.02)
    assert report.kind == "zscore"
    patched = api.patch(
        model, tmp_path / "det.onnx", strategy="guard", telemetry=True, ep="cpu"
    ).output
    file = ModelFile.open(patched)
    for past in (9, 60):  # a cache as in fitting, and keys that fitting has never seen
        f = steps(200, past, seed=past)
        original = run(ModelFile.open(model), f)["y"]
        out = run(file, f)
        flagged = out["atpatch/attention/flagged"].any(axis=(1, 2, 3))
        assert flagged.mean() < 0.08
        np.testing.assert_array_equal(out["y"][~flagged], original[~flagged])
        f["past_k"][:, :, 3] = 30 * np.sign(f["q"][:, :, 0])  # all attention goes to one key
        f["past_v"][...], f["v"][...] = 1, 1
        f["past_v"][:, :, 3] = 100
        out = run(file, f)
        flags = out["atpatch/attention/flagged"]
        assert flags[:, 0, 0, 3].mean() > 0.95
        cured = out["y"][flags[:, 0, 0, 3]]
        # Rows keep their mass: what the key had goes to others, whose values are 1.
        assert np.isfinite(cured).all()
        assert np.median(cured) < 30

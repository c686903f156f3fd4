"""A small release to ship: a model with or without external weights, its patch, proof and data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser

from atpatch_onnx import api

from bad_input import DETECTOR, HOST

WEIGHTS = "weights/ext.data"
FLAGGED = 5.0
"""Scale of inputs that the detector flags."""


def make_release(folder: Path, external: bool = True, **options: bool) -> Path:
    """Fill `folder` with a model, its weights, a detector, a patch, the patched model and data."""
    folder.mkdir(parents=True, exist_ok=True)
    host = onnx.parser.parse_model(HOST)
    if external:
        for tensor in host.graph.initializer:  # only raw data can lie in another file
            array = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
        (folder / WEIGHTS).parent.mkdir()
        target = folder / "model.onnx"
        onnx.save(host, target, save_as_external_data=True, location=WEIGHTS, size_threshold=0)
    else:
        onnx.save(host, folder / "model.onnx")
    detector = onnx.parser.parse_model(DETECTOR.replace('"0.5"', '"0.9"'))
    onnx.save(detector, folder / "det.onnx")
    fixed = {"redistribute": "uniform", "ep": "cpu", **options}
    model, patch = folder / "model.onnx", folder / "fix.atpatch"
    api.patch(model, folder / "det.onnx", **fixed)  # type: ignore[arg-type]
    api.patch(model, folder / "det.onnx", patch_only=patch, **fixed)  # type: ignore[arg-type]
    return folder


def save_data(folder: Path) -> tuple[Path, Path]:
    """Clean inputs, of which none is flagged, and bad ones, of which all are."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 2, 5, 4)).astype(np.float32)
    np.savez(folder / "clean.npz", x=0.1 * x)
    np.savez(folder / "bad.npz", x=FLAGGED * x)
    return folder / "clean.npz", folder / "bad.npz"

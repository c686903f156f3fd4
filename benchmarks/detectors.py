"""A detector whose threshold decides everything: for measuring what a patch costs and keeps."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.parser

from atpatch_onnx.detector import Detector, load_detector

NEVER, ALWAYS = 1.0, 0.0
"""Thresholds that no anomaly passes, and that every over-attended column does."""


def column_mean_detector(path: Path, opset: int, threshold: float) -> Detector:
    """Write a detector to `path`: the anomaly of a column is its mean over heads and queries."""
    axes, given = (
        (", axes", "int64[1] axes = {2}, int64[1] heads = {1}") if opset >= 18 else ("", "")
    )
    heads = ", heads" if opset >= 18 else ""
    over = ("", "") if opset >= 18 else ("axes = [2], ", "axes = [1], ")
    model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : {opset}]>
        det (float[B, H, Q, K] attention) => (float[B, 1, 1, K] anomaly) <{given}> {{
            rows = ReduceMean <{over[0]}keepdims = 1> (attention{axes})
            anomaly = ReduceMean <{over[1]}keepdims = 1> (rows{heads})
        }}
    """)
    onnx.helper.set_model_props(
        model, {"atpatch.abi": "1", "atpatch.threshold": str(threshold), "atpatch.kind": "mean"}
    )
    onnx.save(model, path)
    return load_detector(path, opset)

"""A detector that needs no training: how far is a column from normal, for this site and position?

Features are whitened with clean statistics and the largest over-attention decides.
"""

from __future__ import annotations

from onnx import ModelProto

from .fragment import Constants, Fragment
from .tables import Tables, add_benign, add_whitening, as_detector, unsqueeze


def build_zscore(tables: Tables, opset: int, ir_version: int) -> ModelProto:
    """The detector of `tables`: `attention, layer -> anomaly, benign`; IR version 4 or later.

    The score r >= 0 is mapped to r / (1 + r), so that a threshold t on it is t / (1 + t).
    """
    f = Fragment("zscore", opset, Constants("zscore"))
    found, whitened = add_whitening(f, tables)
    largest = f.axes_op("ReduceMax", whitened, [1], "largest", keepdims=1)
    score = f.op("Max", largest, f.number(0.0), name="score")
    odds = f.op("Add", score, f.number(1.0), name="score_plus_one")
    share = f.op("Div", score, odds, name="score_share")
    outputs = [unsqueeze(f, share, [1], "anomaly"), *add_benign(f, tables, found)]
    return as_detector(f, "zscore", outputs, opset, ir_version)

"""Softmax over scores of which some are hidden, plain and with an attention sink."""

from __future__ import annotations

import math

import numpy as np

from ..fragment import Fragment

LOWEST = float(np.finfo(np.float32).min)


def masked_softmax(
    f: Fragment, scores: str, visible: str, *, biased: bool, none: bool, name: str
) -> str:
    """Probabilities `[B, H, Q, K]`, exactly 0 where not visible. In float32.

    Each row must see a key. biased: scores may be -inf (or float32's lowest number) all the same;
    a row in which all are is 0 if `none`, else what is left: the mean of what is visible.
    """
    if biased:
        scores = f.op("Max", scores, f.number(LOWEST), name=f"{name}_finite")
    hidden = f.op("Where", visible, scores, f.number(-math.inf), name=f"{name}_masked")
    if not (biased and none):
        return f.op("Softmax", hidden, name=name, axis=3)
    every = f.op("Softmax", hidden, name=f"{name}_every", axis=3)
    some = f.op("Greater", hidden, f.number(LOWEST), name=f"{name}_some")
    return f.op("Where", some, every, f.number(0.0), name=name)


def sink_softmax(f: Fragment, scores: str, visible: str, sink: str, name: str) -> str:
    """Probabilities `[B, H, Q, K]` whose rows leave the share of the sink out, in float32.

    sink: logits of it, a scalar or `[1, H, 1, 1]`.
    """
    hidden = f.op("Where", visible, scores, f.number(-math.inf), name=f"{name}_masked")
    largest = f.axes_op("ReduceMax", hidden, [3], f"{name}_largest", keepdims=1)
    top = f.op("Max", largest, sink, name=f"{name}_top")
    below = f.op("Sub", hidden, top, name=f"{name}_below_top")
    weights = f.op("Exp", below, name=f"{name}_weights")
    inside = f.axes_op("ReduceSum", weights, [3], f"{name}_of_keys", keepdims=1)
    left = f.op("Sub", sink, top, name=f"{name}_sink_below_top")
    outside = f.op("Exp", left, name=f"{name}_of_sink")
    whole = f.op("Add", inside, outside, name=f"{name}_whole")
    return f.op("Div", weights, whole, name=name)

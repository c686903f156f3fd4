"""Redistribution of attention: flagged columns get the benign attention, rows keep their mass.

With m the flagged columns, b the benign attention and all sums over the keys of a row:

    out_j = m_j b_j + (1 - m_j) P_j * (sum P - sum m b) / sum (1 - m) P

AtPatch (arXiv 2601.21695) prints the rule for one column; this is its joint form. Three things are
settled here that the formula leaves open:

- a key that a row does not see (P = 0) gets nothing, so masked keys stay masked;
- where b asks for more than the row has, or where no unflagged mass is left to take the rest, b is
  scaled so that the row keeps its mass; where b is zero there too, the row stays as it is;
- sums run over what is kept rather than over what is removed, so that a column that holds nearly
  all the mass costs no precision.
"""

from __future__ import annotations

from enum import StrEnum

import numpy as np
from onnx import TensorProto

from .fragment import Fragment

TINY = 1e-30
"""Mass below this is none: dividing by it would overflow float32."""


class Redistribution(StrEnum):
    """What flagged columns get."""

    BENIGN = "benign"
    """The detector's benign attention."""
    UNIFORM = "uniform"
    """The uniform share: what the row's other visible columns have on average afterwards."""
    PRUNE = "prune"
    """Nothing: the same as a -inf bias on their logits."""


def redistribute(
    f: Fragment,
    probabilities: str,
    flagged: str,
    sample_flagged: str,
    benign: str | None,
    mode: Redistribution,
    elem_type: int,
) -> str:
    """Add the nodes that redistribute; returns the new probabilities in the host's type.

    Shapes: probabilities `[B, H, Q, K]`; flagged, bool, broadcastable to `[B, H, 1, K]`;
    sample_flagged, bool, `[B, 1, 1, 1]`: samples where it is false keep their bits; benign
    broadcastable to `[B, H, Q, K]`, float32; None where the mode does not need it.
    """
    double = elem_type == TensorProto.DOUBLE
    dtype = np.float64 if double else np.float32
    compute = TensorProto.DOUBLE if double else TensorProto.FLOAT
    zero, one, tiny = (f.number(x, dtype) for x in (0.0, 1.0, TINY))
    narrow = elem_type not in (TensorProto.FLOAT, TensorProto.DOUBLE)
    wide = f.cast(probabilities, compute, "wide") if narrow else probabilities

    keep = f.op("Where", flagged, zero, one, name="keep")
    kept = f.op("Mul", wide, keep, name="kept")
    rest = f.axes_op("ReduceSum", kept, [3], "kept_mass", keepdims=1)
    mass = f.axes_op("ReduceSum", wide, [3], "row_mass", keepdims=1)
    some_rest = f.op("Max", rest, tiny, name="some_kept_mass")
    if mode is Redistribution.PRUNE:
        scale = f.op("Div", mass, some_rest, name="scale")
        moved = f.op("Mul", kept, scale, name="redistributed")
        usable = f.op("Greater", rest, tiny, name="usable")
    else:
        if benign is None:
            benign = _uniform(f, wide, mass, compute)
        elif double:
            benign = f.cast(benign, compute, "benign_wide")
        benign = f.op("Max", benign, zero, name="benign_not_negative")
        # Small before large: a benign attention without rows is made Q x K only by the Min, which
        # gives nothing to unseen keys and costs half of a Where. (A probability below the normal
        # numbers of its type counts as hardly seen.)
        wanted = f.op("Where", flagged, benign, zero, name="wanted")
        huge = f.number(float(np.finfo(dtype).max) * 0.5, dtype)
        seen = f.op("Mul", wide, huge, name="visible")
        target = f.op("Min", seen, wanted, name="target")
        asked = f.axes_op("ReduceSum", target, [3], "asked_mass", keepdims=1)
        has_rest = f.op("Greater", rest, tiny, name="has_kept_mass")
        limit = f.op("Min", asked, mass, name="limited_mass")
        given = f.op("Where", has_rest, limit, mass, name="given_mass")
        left = f.op("Sub", mass, given, name="left_mass")
        scale = f.op("Div", left, some_rest, name="scale")
        some_asked = f.op("Max", asked, tiny, name="some_asked_mass")
        shrink = f.op("Div", given, some_asked, name="target_scale")
        moved = f.op(
            "Add",
            f.op("Mul", kept, scale, name="kept_scaled"),
            f.op("Mul", target, shrink, name="target_scaled"),
            name="redistributed",
        )
        either = f.op("Max", rest, asked, name="kept_or_asked_mass")
        usable = f.op("Greater", either, tiny, name="usable")
    chosen = f.op("And", usable, sample_flagged, name="chosen")
    if not narrow:
        return f.op("Where", chosen, moved, wide, name="probabilities")
    if elem_type == TensorProto.BFLOAT16 and f.opset < 16:
        # Where learns bfloat16 at opset 16; the way through float32 keeps every bit too.
        return f.cast(
            f.op("Where", chosen, moved, wide, name="selected"), elem_type, "probabilities"
        )
    back = f.cast(moved, elem_type, "redistributed_narrow")
    return f.op("Where", chosen, back, probabilities, name="probabilities")


def _uniform(f: Fragment, wide: str, mass: str, compute: int) -> str:
    """The uniform share `[B, H, Q, 1]` of each row: its mass by the number of keys that it sees.

    With it the unflagged columns have the same share on average, however many are flagged. (The
    mean that they had before would take all of the row as soon as half of it is flagged.)
    """
    dtype = np.float64 if compute == TensorProto.DOUBLE else np.float32
    seen = f.op("Greater", wide, f.number(0.0, dtype), name="seen")
    ones = f.cast(seen, compute, "seen_ones")
    count = f.axes_op("ReduceSum", ones, [3], "seen_count", keepdims=1)
    some = f.op("Max", count, f.number(1.0, dtype), name="seen_some")
    return f.op("Div", mass, some, name="uniform")

"""Rotary position embedding (arXiv 2104.09864) in plain nodes."""

from __future__ import annotations

from ..fragment import Fragment
from . import steps


def rotate(
    f: Fragment, value: str, cos: str, sin: str, *, interleaved: bool, whole: bool, name: str
) -> str:
    """`[B, H, L, D]` with its first R features rotated.

    cos, sin `[B or 1, L, R/2]`: of the angles of each position, in the type of `value`.
    interleaved: features 2i and 2i + 1 are a pair, as against i and i + R/2; whole: R is known to
    be D.
    """
    turned, rest = value, ""
    if not whole:
        half = steps.length(f, cos, 2, f"{name}_half")
        features = f.op("Mul", half, f.ints(2), name=f"{name}_features")
        turned = steps.first_of(f, value, features, 3, f"{name}_turned")
        end = f.ints(2**31 - 1)
        rest = f.op("Slice", value, features, end, f.ints(3), name=f"{name}_rest")
    # One axis more: [B, H, L, 2, R/2], or [B, H, L, R/2, 2] where pairs are neighbours.
    axis = 4 if interleaved else 3
    dims = (0, 0, 0, -1, 2) if interleaved else (0, 0, 0, 2, -1)
    pairs = steps.reshape_like(f, turned, dims, f"{name}_pairs")
    first = f.slice(pairs, 0, 1, axis, f"{name}_first")
    second = f.slice(pairs, 1, 2, axis, f"{name}_second")
    wide_cos = f.axes_op("Unsqueeze", cos, [1, axis], f"{name}_cos")
    wide_sin = f.axes_op("Unsqueeze", sin, [1, axis], f"{name}_sin")

    def product(factor: str, angle: str, label: str) -> str:
        return f.op("Mul", factor, angle, name=f"{name}_{label}")

    left = f.op(
        "Sub",
        product(first, wide_cos, "first_cos"),
        product(second, wide_sin, "second_sin"),
        name=f"{name}_first_rotated",
    )
    right = f.op(
        "Add",
        product(first, wide_sin, "first_sin"),
        product(second, wide_cos, "second_cos"),
        name=f"{name}_second_rotated",
    )
    both = f.op("Concat", left, right, name=f"{name}_both", axis=axis)
    joined = steps.reshape_like(f, both, (0, 0, 0, -1), name if whole else f"{name}_joined")
    return joined if whole else f.op("Concat", joined, rest, name=name, axis=3)

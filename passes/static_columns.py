"""Columns that are always flagged, as a mask."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from ..errors import InputError
from .fragment import Fragment
from .locate import Site
from .switches import ENABLED


def static_columns(
    f: Fragment, site: Site, columns: tuple[int, ...], whole: str, by_sample: bool, toggle: bool
) -> str:
    """Add the nodes for a mask `[1, 1, 1, K]`, bool, of the columns; `[B, 1, 1, K]` by sample.

    Without columns, by sample, nothing is marked.

    whole: the site's map `[B, H, Q, K]`; toggle: whether `ENABLED` switches it.
    Raises: InputError for a column that the map does not have.
    """
    keys = site.facts.shape[-1] if site.facts.shape else None
    if not columns:
        one = whole
        for axis in (1, 2):
            one = f.slice(one, 0, 1, axis, f"first{axis}")
        wide = f.cast(one, TensorProto.FLOAT, "first")
        return f.op("Less", wide, f.number(-1.0), name="no_columns")
    if isinstance(keys, int):
        outside = [c for c in columns if not -keys <= c < keys]
        if outside:
            raise InputError(
                f"--columns {outside[0]}: site '{site.name}' has columns 0 to {keys - 1}"
            )
        mask = np.zeros((1, 1, 1, keys), bool)
        mask[..., list(columns)] = True
        flagged = f.constants.add(f"columns{'_'.join(map(str, columns))}of{keys}", mask)
    else:
        flagged = _computed(f, columns, whole)
    if by_sample:
        one = whole
        for axis in (1, 2, 3):
            one = f.slice(one, 0, 1, axis, f"first{axis}")
        wide = f.cast(one, TensorProto.FLOAT, "first")
        every = f.op("Greater", wide, f.number(-1.0), name="every_sample")
        flagged = f.op("And", flagged, every, name="columns_by_sample")
    if toggle:
        return f.op("And", flagged, ENABLED, name="flagged")
    return f.op("Identity", flagged, name="flagged") if by_sample else flagged


def _computed(f: Fragment, columns: tuple[int, ...], whole: str) -> str:
    """The mask where the number of columns is known only at run time."""
    if f.opset < 11 and min(columns) < 0:
        raise InputError(
            "--columns counts from the end only from opset 11 on: give columns from the start"
        )
    shape = f.op("Shape", whole, name="whole_shape")
    keys = f.slice(shape, 3, 4, 0, "map_keys")
    hot = f.constants.add("off_on", np.array([0, 1], np.float32))
    rows = f.op("OneHot", f.ints(*columns), keys, hot, name="column_rows")
    row = f.axes_op("ReduceMax", rows, [0], "column_row", keepdims=1)
    mask = f.axes_op("Unsqueeze", row, [0, 1], "column_mask")
    return f.cast(mask, TensorProto.BOOL, "columns")

"""CleanSight as a detector of scope `model`: is the image looked at as usual?

Statistics of all detection sites (see `visual_ratio`) are whitened with those of clean inputs. How
far an input is from normal is their norm, as in the paper, or, where bad inputs are known, how far
it is on the way to those. Of one that is too far, visual keys are pruned.

Source: CleanSight, arXiv 2603.12989; there the statistic is the ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from .fragment import Fragment
from .tables import unsqueeze
from .visual_prompt import Parts, Tokens
from .visual_ratio import Measured, Statistic, as_fragment, start

FARTHEST = 1e6
"""No distance is larger: a threshold above it is still below 1 in float32."""


class Distance(StrEnum):
    """How far an input is from normal, of what is whitened."""

    NORM = "norm"
    """The norm."""
    PROJECTION = "projection"
    """The sum, where that is positive: `gain` is a direction."""


@dataclass(frozen=True)
class Table:
    """What is normal of a statistic at a site; whitened is (value - center) * gain.

    center, gain: `[H]`, or of columns `[H, V]`, the visual keys in order; keys behind the last one
    are like it.
    """

    site: str
    statistic: Statistic
    center: NDArray[np.float32]
    gain: NDArray[np.float32]


@dataclass(frozen=True)
class Pruning:
    """Visual keys with more than `tau` of the last row at any of `sites`, in any head, are pruned.

    strongest: the one with the most of it is pruned even if that is less.
    """

    sites: tuple[str, ...]
    tau: float
    strongest: bool = False


def build_cleansight(
    sites: Sequence[str],
    tables: Sequence[Table],
    distance: Distance,
    pruning: Pruning,
    parts: Parts,
    opset: int,
    ir_version: int,
) -> ModelProto:
    """The detector: `attention.<site>` of each site (and masks) -> `anomaly`.

    sites: all that `tables` and `pruning` name, in flow: where tokens are is read off the first, so
    that the map of each is reduced where it is made.
    The anomaly of a key to prune is d / (1 + d), with d the distance of the input; of others 0.
    """
    f, tokens = start(sites[0], parts, opset)
    measured = {site: Measured(f, site, tokens) for site in sites}
    terms = [_term(f, measured[table.site], table, distance, tokens) for table in tables]
    total = terms[0]
    for number, term in enumerate(terms[1:], 2):
        total = f.op("Add", total, term, name=f"sum_of_{number}")
    if distance is Distance.NORM:
        far = f.op("Sqrt", total, name="norm")
    else:
        far = f.op("Max", total, f.number(0.0), name="projection")
    far = f.op("Min", far, f.number(FARTHEST), name="distance")
    score = f.op("Div", far, f.op("Add", far, f.number(1.0), name="odds"), name="score")
    pruned = _pruned(f, [measured[site].strongest for site in pruning.sites], pruning, tokens)
    anomaly = f.op("Where", pruned, score, f.number(0.0), name="anomaly_by_key")
    output = unsqueeze(f, anomaly, [1, 2], "anomaly")
    return as_fragment(f, sites, parts, [output], {"anomaly": 4}, ir_version)


def _term(f: Fragment, at: Measured, table: Table, distance: Distance, tokens: Tokens) -> str:
    """What a table adds to the sum `[B, 1]`."""
    f = f.within(f"{table.site}/{table.statistic}")
    center, gain = (
        f.constants.add(f"{table.site}/{table.statistic}/{name}", values.astype(np.float32))
        for name, values in (("center", table.center), ("gain", table.gain))
    )
    if table.statistic is Statistic.COLUMNS:
        last = f.number(table.center.shape[1] - 1.0)
        place = f.cast(f.op("Min", tokens.rank, last, name="rank"), TensorProto.INT64, "place")
        center, gain = _by_key(f, center, place, "center"), _by_key(f, gain, place, "gain")
    centered = f.op("Sub", at[table.statistic], center, name="centered")
    whitened = f.op("Mul", centered, gain, name="whitened")
    if distance is Distance.NORM:
        whitened = f.op("Mul", whitened, whitened, name="square")
    if table.statistic is Statistic.COLUMNS:
        mask = f.axes_op("Unsqueeze", tokens.visual, [1], "visual_by_head")
        whitened = f.op("Mul", whitened, mask, name="of_visual_keys")
        whitened = f.axes_op("ReduceSum", whitened, [2], "by_head", keepdims=0)
    return f.axes_op("ReduceSum", whitened, [1], "sum", keepdims=1)


def _by_key(f: Fragment, table: str, place: str, name: str) -> str:
    """The entries `[B, H, K]` of a table `[H, V]` for keys whose places are `[B, K]`."""
    picked = f.op("Gather", table, place, name=f"{name}_picked", axis=1)
    return f.op("Transpose", picked, name=f"{name}_by_key", perm=[1, 0, 2])


def _pruned(f: Fragment, shares: Sequence[str], pruning: Pruning, tokens: Tokens) -> str:
    """Bool `[B, K]`."""
    most = shares[0]
    for number, further in enumerate(shares[1:], 2):
        most = f.op("Max", most, further, name=f"share_of_{number}")
    chosen = f.op("Greater", most, f.number(pruning.tau), name="above_tau")
    if pruning.strongest:
        visual = f.op("Mul", most, tokens.visual, name="visual_share")
        largest = f.axes_op("ReduceMax", visual, [1], "largest_share", keepdims=1)
        weaker = f.op("Less", most, largest, name="weaker")
        chosen = f.op("Or", chosen, f.op("Not", weaker, name="strongest"), name="to_prune")
    return f.op("And", chosen, tokens.is_visual, name="pruned")

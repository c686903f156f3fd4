"""How well a number tells bad inputs from clean ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEAST_SPREAD = 1e-6


def auroc(normal: Floats, abnormal: Floats) -> float:
    """The chance that an abnormal value is above a normal one; half of it where they are equal."""
    ordered = np.sort(normal)
    below = np.searchsorted(ordered, abnormal, "left")
    upto = np.searchsorted(ordered, abnormal, "right")
    return float((below + upto).mean() / 2 / len(normal))


def rise(normal: Floats, abnormal: Floats) -> float:
    """The difference of the means by the root mean square of the spreads (d')."""
    spread = np.sqrt((normal.var() + abnormal.var()) / 2)
    return float((abnormal.mean() - normal.mean()) / max(spread, LEAST_SPREAD))

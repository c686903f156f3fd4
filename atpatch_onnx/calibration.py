"""Thresholds from held-out clean inputs, and what they are worth."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Calibration:
    """A threshold and what it is worth.

    score: largest score that a clean input may have at any site.
    threshold: the same on the detector's 0..1 scale.
    budget: the per-input false-positive rate asked for.
    expected_fpr: false-positive rate to expect on unseen clean inputs, from exchangeability.
    calibration_inputs, fit_inputs: how many inputs each step has seen.
    honoured: whether there were enough inputs to promise the budget.
    """

    score: float
    threshold: float
    budget: float
    expected_fpr: float
    calibration_inputs: int
    fit_inputs: int
    honoured: bool

    @property
    def inputs_needed(self) -> int:
        """How many clean inputs would be enough to promise the budget."""
        return 2 * math.ceil(1 / self.budget)


def held_out(count: int, fpr: float) -> int:
    """How many inputs to calibrate on: what the budget needs, within 30 % to 50 % of all."""
    needed = math.ceil(1 / fpr)
    return min(max(needed, round(0.3 * count)), count // 2)


def calibrate(anomalies: NDArray[np.float64], budget: float, fit_inputs: int) -> Calibration:
    """The least threshold that keeps the budget on exchangeable clean inputs.

    The k-th smallest of n held-out maxima, k = ceil((n + 1)(1 - budget)), is exceeded by a new
    clean input with probability at most 1 - k / (n + 1) (split conformal prediction, Vovk et al.
    2005). With fewer than 1 / budget - 1 inputs no threshold can promise the budget: the largest is
    taken.
    """
    ordered = np.sort(anomalies)
    n = len(ordered)
    k = min(math.ceil((n + 1) * (1 - budget)), n)
    anomaly = float(ordered[k - 1])
    # Flagged means strictly above, so that the calibrating input itself is not.
    threshold = float(np.nextafter(np.float32(anomaly), np.float32(2)))
    expected = 1 - k / (n + 1)
    return Calibration(
        score=anomaly / max(1 - anomaly, 1e-9),
        threshold=threshold,
        budget=budget,
        expected_fpr=expected,
        calibration_inputs=n,
        fit_inputs=fit_inputs,
        honoured=expected <= budget + 1e-12,
    )

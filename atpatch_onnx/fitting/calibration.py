"""Thresholds from held-out clean inputs, and what they are worth."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..rates import Rate


@dataclass(frozen=True)
class Calibration:
    """A threshold and what it is worth.

    score: largest score that a clean input may have at any site.
    threshold: the same on the detector's 0..1 scale.
    budget: the per-input false-positive rate asked for.
    expected_fpr: false-positive rate to expect on unseen clean inputs, from exchangeability.
    calibration_inputs, fit_inputs: how many inputs each step has seen.
    flagged: share of the held-out inputs that are above the threshold, with its interval: what the
        false-positive rate on unseen clean inputs may turn out to be.
    honoured: whether there were enough inputs to keep the budget, to half an input.
    """

    score: float
    threshold: float
    budget: float
    expected_fpr: float
    calibration_inputs: int
    fit_inputs: int
    flagged: Rate
    honoured: bool

    def at(self, threshold: float, anomalies: NDArray[np.float64]) -> Calibration:
        """The same at another threshold; anomalies: of the held-out clean inputs."""
        hits = int((anomalies > threshold).sum())
        return replace(
            self,
            score=threshold / max(1 - threshold, 1e-9),
            threshold=threshold,
            expected_fpr=(hits + 1) / (len(anomalies) + 1),
            flagged=Rate.counted(hits, len(anomalies)),
        )

    @property
    def inputs_needed(self) -> int:
        """How many clean inputs would be enough to promise the budget."""
        return 2 * math.ceil(1 / self.budget)


def held_out(count: int) -> int:
    """How many inputs to calibrate on: half, because a tail needs more of them than a mean."""
    return count // 2


def calibrate(anomalies: NDArray[np.float64], budget: float, fit_inputs: int) -> Calibration:
    """The threshold whose false-positive rate on exchangeable clean inputs is next to the budget.

    The k-th smallest of n held-out maxima is exceeded by a new clean input with probability
    1 - k / (n + 1) (split conformal prediction, Vovk et al. 2005); k is (n + 1)(1 - budget) rounded
    to the nearest: rounding up would let one outlier among few inputs set the threshold alone. With
    fewer than 1 / budget - 1 inputs no threshold can keep the budget: the largest is taken.
    """
    ordered = np.sort(anomalies)
    n = len(ordered)
    k = min(max(round((n + 1) * (1 - budget)), 1), n)
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
        flagged=Rate.counted(int((anomalies > threshold).sum()), n),
        honoured=(n + 1) * budget >= 1,
    )


def raised(threshold: float, anomalies: NDArray[np.float64], missed: float = 0.01) -> float:
    """A threshold moved up towards bad inputs that are known, and so further from clean ones.

    It comes halfway, in odds, between `threshold` and what all but a share `missed` of the bad
    inputs, which nothing was fitted on, are above; it stays where those are below it.
    """
    least = float(np.quantile(anomalies, missed))
    if not 0 < threshold < least < 1:
        return threshold
    odds = math.sqrt(threshold / (1 - threshold) * least / (1 - least))
    return float(np.float32(odds / (1 + odds)))

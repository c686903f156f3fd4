"""Thresholds that bad inputs may raise."""

from __future__ import annotations

import numpy as np
import pytest

from atpatch_onnx.fitting.calibration import calibrate, raised

CLEAN = np.linspace(0.1, 0.6, 199)


def test_bad_inputs_that_are_farther_raise_the_threshold_halfway_in_odds() -> None:
    bad = np.full(100, 0.9)
    before = calibrate(CLEAN, 0.05, 100)
    threshold = raised(before.threshold, bad)
    odds = threshold / (1 - threshold)
    assert odds == pytest.approx(np.sqrt(before.threshold / (1 - before.threshold) * 9), rel=1e-5)
    after = before.at(threshold, CLEAN)
    assert after.flagged.hits == (threshold < CLEAN).sum() == 0 < before.flagged.hits
    assert after.expected_fpr == 1 / 200
    assert after.budget == before.budget


def test_bad_inputs_that_are_not_told_apart_leave_it_as_it_is() -> None:
    before = calibrate(CLEAN, 0.05, 100)
    for bad in (np.full(100, 0.2), np.r_[np.zeros(10), np.full(90, 0.9)], np.full(100, 1.0)):
        assert raised(before.threshold, bad) == before.threshold
    after = before.at(before.threshold, CLEAN)
    assert after.flagged == before.flagged
    assert after.expected_fpr == pytest.approx(before.expected_fpr)

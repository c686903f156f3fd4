"""Rates and their intervals."""

from __future__ import annotations

import numpy as np
import pytest

from atpatch_onnx.rates import Rate

COUNTS = [(0, 1), (1, 1), (0, 350), (350, 350), (1, 350), (3, 7), (4321, 10_000)]


@pytest.mark.parametrize("total", [1, 350, 100_000])
def test_the_ends_for_none_and_all_have_a_closed_form(total: int) -> None:
    none, every = Rate.counted(0, total), Rate.counted(total, total)
    end = 1 - 0.025 ** (1 / total)
    assert (none.value, none.low, none.high) == pytest.approx((0, 0, end), rel=1e-9)
    assert (every.value, every.low, every.high) == pytest.approx((1, 1 - end, 1), rel=1e-9)


@pytest.mark.parametrize(("hits", "total"), COUNTS)
def test_the_interval_is_scipys(hits: int, total: int) -> None:
    stats = pytest.importorskip("scipy.stats", reason="the [train] extra brings it")
    expected = stats.binomtest(hits, total).proportion_ci(0.95, method="exact")
    rate = Rate.counted(hits, total)
    assert (rate.low, rate.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.3, 0.98])
def test_at_least_95_percent_of_intervals_hold_the_truth(share: float) -> None:
    total = 400
    k = np.arange(total + 1)
    ways = np.concatenate(([0.0], np.cumsum(np.log((total + 1 - k[1:]) / k[1:]))))
    likely = np.exp(ways + k * np.log(share) + (total - k) * np.log(1 - share))
    rates = [Rate.counted(int(hits), total) for hits in k]
    holds = np.array([rate.low <= share <= rate.high for rate in rates])
    assert 0.95 <= likely[holds].sum() <= 0.995


@pytest.mark.parametrize(("hits", "total"), [(0, 0), (2, 1), (-1, 5)])
def test_what_is_no_share_is_refused(hits: int, total: int) -> None:
    with pytest.raises(ValueError, match="hits <= total"):
        Rate.counted(hits, total)

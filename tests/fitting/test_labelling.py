"""Labels: over-attended is what doubled, in the mean or where it decides, and is above uniform."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from atpatch_onnx.fitting.labelling import over_attended
from atpatch_onnx.fitting.statistics import Found, Whitening
from atpatch_onnx.passes.features import BASIC, HIDDEN
from atpatch_onnx.passes.locate import Site, locate

from hosts import KEYS, model_file, over_attending

PLACE = 3
NOTABLE = {"mean", "first_row"}
"""Features in which a rise counts at a site that is not causal."""
MARKED = NOTABLE | {"head_maximum"}
"""The same of columns that are marked."""


@pytest.fixture(scope="module")
def site() -> Site:
    return locate(model_file(over_attending(fixed=True)).skeleton).sites[0]


def normal(site: Site, mean: float = 0.0) -> Whitening:
    shape = (len(BASIC), KEYS)
    return Whitening(
        BASIC,
        {site.name: np.full(shape, mean)},
        {site.name: np.full(shape, 0.1)},
        {site.name: np.full((1, KEYS), 1 / KEYS)},
        {site.name: 1},
        {site.name: KEYS},
        buckets=False,
    )


def one_input(feature: str, value: float, elsewhere: float = 0.0) -> Found:
    """All features are `elsewhere`, but one of the column at PLACE."""
    features = np.full((1, len(BASIC), KEYS), elsewhere)
    features[0, BASIC.index(feature), PLACE] = value
    columns = np.full((1, 1, KEYS), 1 / KEYS)
    return Found(columns, features, np.zeros((1, KEYS), np.int64), 1)


def at(*places: int) -> NDArray[np.bool_]:
    marks = np.zeros((1, KEYS), bool)
    marks[0, list(places)] = True
    return marks


@pytest.mark.parametrize("feature", BASIC)
@pytest.mark.parametrize("marked", [True, False])
def test_a_rise_counts_in_the_mean_in_the_row_that_decides_and_if_marked_in_one_head(
    site: Site, feature: str, marked: bool
) -> None:
    found = one_input(feature, 1.01 * math.log(2))
    anomalous = over_attended(normal(site), site, found, at(PLACE, 0) if marked else None)
    notable = feature in (MARKED if marked else NOTABLE)
    assert np.array_equal(anomalous, at(PLACE) if notable else at())


@pytest.mark.parametrize("feature", BASIC)
def test_less_than_twice_the_share_is_no_over_attention(site: Site, feature: str) -> None:
    found = one_input(feature, 0.99 * math.log(2))
    assert not over_attended(normal(site), site, found, at(PLACE)).any()


def test_what_is_not_marked_or_below_the_uniform_share_is_not_labelled(site: Site) -> None:
    risen = one_input("head_maximum", 2.0)
    assert not over_attended(normal(site), site, risen, at(0)).any()
    below = -0.5 * math.log(KEYS) - 0.01
    rare = one_input("head_maximum", below, elsewhere=-5.0)
    assert not over_attended(normal(site, -5.0), site, rare, at(PLACE)).any()


def test_what_no_query_sees_is_not_labelled(site: Site) -> None:
    found = one_input("head_maximum", 2.0)
    found.bucket[0, PLACE] = HIDDEN
    assert not over_attended(normal(site), site, found, at(PLACE)).any()

"""CleanSight against the method written down in NumPy, sample by sample, in float64.

The reference is told which tokens are padding; the detector finds out from the maps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from atpatch_onnx.passes.cleansight import Distance, Pruning, Table, build_cleansight
from atpatch_onnx.passes.visual_prompt import KeyMask, KeyRange, Parts
from atpatch_onnx.passes.visual_ratio import Statistic
from atpatch_onnx.runtime import Arrays

from hosts import run_model

SITES = ("blocks.0", "blocks.1")
HEADS, KEYS, VISUAL = 3, 12, 5
START = 2
RANGES = Parts(KeyRange(START, START + VISUAL), KeyRange(START + VISUAL))

Floats = NDArray[np.float64]
Places = NDArray[np.intp]


@dataclass(frozen=True)
class Maps:
    """Causal maps by site, and which keys of each sample are no padding, bool `[B, K]`."""

    by_site: dict[str, NDArray[np.float32]]
    valid: NDArray[np.bool_]

    @property
    def feeds(self) -> Arrays:
        return {f"attention.{site}": maps for site, maps in self.by_site.items()}

    def take(self, index: slice) -> Maps:
        return Maps({s: m[index] for s, m in self.by_site.items()}, self.valid[index])


def random_maps(seed: int, queries: int = KEYS, dtype: type[np.floating] = np.float32) -> Maps:
    """Eight samples: without padding, with padding on the left, and on the right.

    Where a row sees nothing, it is uniform over all keys (as with a finite bias), or NaN.
    """
    rng = np.random.default_rng(seed)
    valid = np.ones((8, KEYS), bool)
    for sample, padding in ((1, 1), (2, 3), (3, 2), (6, 3)):
        valid[sample, :padding] = False
    for sample, padding in ((4, 1), (5, 4)):
        valid[sample, -padding:] = False
    causal = np.tri(queries, KEYS, KEYS - queries, dtype=bool)
    seen = np.broadcast_to((causal & valid[:, None])[:, None], (8, HEADS, queries, KEYS))
    by_site = {}
    for site in SITES:
        logits = np.where(seen, 2 * rng.standard_normal(seen.shape), -np.inf)
        with np.errstate(invalid="ignore"):
            exp = np.exp(logits - logits.max(-1, keepdims=True))
        maps = exp / exp.sum(-1, keepdims=True)
        uniform = np.isnan(maps) & (np.arange(8) != 3)[:, None, None, None]
        by_site[site] = np.where(uniform, 1 / KEYS, maps).astype(dtype).astype(np.float32)
    return Maps(by_site, valid)


def tables_of(statistics: str, seed: int, places: int = VISUAL) -> list[Table]:
    rng = np.random.default_rng(seed)
    tables = []
    for site in SITES:
        for statistic in map(Statistic, statistics.split()):
            shape = (HEADS, places) if statistic is Statistic.COLUMNS else (HEADS,)
            center = rng.normal(-2 if statistic is Statistic.COLUMNS else 0, 1, shape)
            gain = rng.uniform(0.1, 1, shape) * rng.choice((-1, 1), shape)
            tables.append(
                Table(site, statistic, center.astype(np.float32), gain.astype(np.float32))
            )
    return tables


def last_row(maps: Floats, valid: NDArray[np.bool_]) -> Floats:
    """`[H, K]` of the last token of a sample."""
    last = int(np.flatnonzero(valid)[-1])
    return maps[:, last - (KEYS - maps.shape[1])]


def whitened(table: Table, maps: Floats, valid: NDArray[np.bool_], image: Places) -> Floats:
    """A sample's map `[H, Q, K]` by the table; all behind the image is the prompt."""
    row = last_row(maps, valid)
    prompt = valid & (np.arange(KEYS) > image[-1])
    seen, asked = row[:, image].sum(1), row[:, prompt].sum(1)
    place = np.minimum(np.arange(len(image)), table.center.shape[-1] - 1)
    center, gain = table.center.astype(np.float64), table.gain.astype(np.float64)
    if table.statistic is Statistic.COLUMNS:
        values = np.log(maps[:, valid[KEYS - maps.shape[1] :]].mean(1)[:, image])
        center, gain = center[:, place], gain[:, place]
    elif table.statistic is Statistic.LOG_RATIO:
        values = np.log(seen) - np.log(asked)
    else:
        values = seen / (asked + 1e-12)
    return np.ravel((values - center) * gain)


def reference(
    maps: Maps,
    tables: list[Table],
    distance: Distance,
    pruning: Pruning,
    visual: NDArray[np.bool_],
) -> Floats:
    """The anomaly `[B, K]`."""
    anomaly = np.zeros(visual.shape)
    for sample, valid in enumerate(maps.valid):
        image = np.flatnonzero(visual[sample])
        at = {site: whole[sample].astype(np.float64) for site, whole in maps.by_site.items()}
        values = np.concatenate([whitened(t, at[t.site], valid, image) for t in tables])
        norm = np.sqrt((values**2).sum())
        far = norm if distance is Distance.NORM else max(values.sum(), 0.0)
        strongest = np.max([last_row(at[site], valid).max(0) for site in pruning.sites], axis=0)
        strongest = strongest[image]
        pruned = strongest > pruning.tau
        if pruning.strongest:
            pruned[strongest.argmax()] = True
        anomaly[sample, image[pruned]] = far / (1 + far)
    return anomaly


def visual_keys(maps: Maps, start: int = START) -> NDArray[np.bool_]:
    """The image behind `start` tokens of each sample."""
    visual = np.zeros(maps.valid.shape, bool)
    for marks, valid in zip(visual, maps.valid, strict=True):
        marks[np.flatnonzero(valid)[start : start + VISUAL]] = True
    return visual


def anomalies(detector: ModelProto, feeds: Arrays) -> Floats:
    found = run_model(detector, feeds)["anomaly"]
    assert found.shape[1:] == (1, 1, KEYS)
    anomaly: Floats = found[:, 0, 0].astype(np.float64)
    return anomaly


VARIANTS = [
    ("ratio", Distance.NORM),
    ("log-ratio", Distance.NORM),
    ("columns", Distance.NORM),
    ("log-ratio columns", Distance.PROJECTION),
]
variants = pytest.mark.parametrize(("statistics", "distance"), VARIANTS)
LAST, ANY = Pruning(SITES[-1:], 0.1), Pruning(SITES, 0.3, strongest=True)


def agree(found: Floats, wanted: Floats) -> None:
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_array_equal(found > 0, wanted > 0)
    scores = np.unique(wanted)
    middle = len(scores) // 2
    threshold = scores[middle - 1 : middle + 1].mean()
    np.testing.assert_array_equal(found > threshold, wanted > threshold)


@variants
@pytest.mark.parametrize("opset", [11, 13, 17, 18, 24])
def test_it_decides_as_the_method_does(statistics: str, distance: Distance, opset: int) -> None:
    tables = tables_of(statistics, 1)
    for pruning in (LAST, ANY):
        detector = build_cleansight(SITES, tables, distance, pruning, RANGES, opset, 9)
        for seed in range(5):
            maps = random_maps(seed)
            wanted = reference(maps, tables, distance, pruning, visual_keys(maps))
            assert 0 < (wanted > 0).sum() < visual_keys(maps).sum()
            agree(anomalies(detector, maps.feeds), wanted)


@variants
def test_a_mixed_batch_is_eight_single_runs(statistics: str, distance: Distance) -> None:
    detector = build_cleansight(SITES, tables_of(statistics, 2), distance, ANY, RANGES, 17, 8)
    maps = random_maps(7)
    alone = [anomalies(detector, maps.take(slice(i, i + 1)).feeds) for i in range(8)]
    found = anomalies(detector, maps.feeds)
    assert len(np.unique(found)) > 4
    np.testing.assert_array_equal(found, np.concatenate(alone))


@variants
def test_queries_may_be_fewer_than_keys(statistics: str, distance: Distance) -> None:
    """A cache holds the first tokens; only padding on the left goes with one."""
    tables = tables_of(statistics, 3)
    detector = build_cleansight(SITES, tables, distance, LAST, RANGES, 17, 8)
    maps = random_maps(8, queries=4).take(slice(0, 4))
    visual = visual_keys(maps)
    agree(anomalies(detector, maps.feeds), reference(maps, tables, distance, LAST, visual))


@pytest.mark.parametrize(
    "part", [KeyRange(START, START + VISUAL), KeyRange(-5, -2), KeyRange(1, -4), KeyRange(0, -2)]
)
def test_ranges_count_from_both_ends_as_python_does(part: KeyRange) -> None:
    tables = tables_of("ratio columns", 4)
    detector = build_cleansight(SITES, tables, Distance.NORM, ANY, Parts(part), 17, 8)
    maps = random_maps(9)
    visual = np.zeros(maps.valid.shape, bool)
    for marks, valid in zip(visual, maps.valid, strict=True):
        marks[np.flatnonzero(valid)[part.start : part.end]] = True
    agree(anomalies(detector, maps.feeds), reference(maps, tables, Distance.NORM, ANY, visual))


@pytest.mark.parametrize(
    ("elem_type", "dtype"),
    [(TensorProto.BOOL, bool), (TensorProto.INT64, np.int64), (TensorProto.FLOAT, np.float32)],
)
def test_a_mask_says_where_the_image_is(elem_type: int, dtype: type[np.generic]) -> None:
    """At another place in each sample."""
    tables = tables_of("log-ratio columns", 5)
    parts = Parts(KeyMask(elem_type))
    detector = build_cleansight(SITES, tables, Distance.NORM, ANY, parts, 17, 8)
    maps = random_maps(10)
    visual = np.zeros(maps.valid.shape, bool)
    for start, (marks, valid) in enumerate(zip(visual, maps.valid, strict=True)):
        marks[np.flatnonzero(valid)[start % 3 : start % 3 + VISUAL]] = True
    feeds = {**maps.feeds, "visual": visual.astype(dtype)}
    agree(anomalies(detector, feeds), reference(maps, tables, Distance.NORM, ANY, visual))


def test_keys_behind_the_last_known_place_are_like_it() -> None:
    tables = tables_of("columns", 6, places=2)
    detector = build_cleansight(SITES, tables, Distance.NORM, LAST, RANGES, 17, 8)
    maps = random_maps(11)
    visual = visual_keys(maps)
    agree(anomalies(detector, maps.feeds), reference(maps, tables, Distance.NORM, LAST, visual))


@pytest.mark.parametrize("nothing", [0.0, np.nan])
@variants
def test_a_sample_that_is_all_padding_is_not_flagged(
    statistics: str, distance: Distance, nothing: float
) -> None:
    pruning = Pruning(SITES, 0.0)
    detector = build_cleansight(SITES, tables_of(statistics, 2), distance, pruning, RANGES, 17, 8)
    maps = random_maps(7)
    for values in maps.by_site.values():
        values[0] = nothing
    found = anomalies(detector, maps.feeds)
    assert (found[0] == 0).all()
    assert np.isfinite(found).all()


def test_a_head_that_never_changed_and_a_prompt_that_nobody_reads_stay_finite() -> None:
    tables = [
        Table(site, Statistic.RATIO, np.zeros(HEADS, np.float32), np.full(HEADS, 1e8, np.float32))
        for site in SITES
    ]
    pruning = Pruning(SITES, 0.0)
    detector = build_cleansight(SITES, tables, Distance.NORM, pruning, RANGES, 17, 8)
    maps = random_maps(12, dtype=np.float16)
    for values in maps.by_site.values():
        values[..., START + VISUAL :] = 0
        values[..., -1, -1] = np.float16(6e-8)
    found = anomalies(detector, maps.feeds)
    assert np.isfinite(found).all()
    assert found.max() < np.nextafter(np.float32(found.max()), np.float32(2)) < 1

"""Trained detectors compute in ONNX Runtime what torch computed when they were trained."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import ModelProto

from atpatch_onnx.passes.column_net import (
    LIMIT,
    ColumnNet,
    Dense,
    Levels,
    MapCnn,
    build_columns,
    build_contrastive,
    build_map_cnn,
)
from atpatch_onnx.passes.features import BUCKETS, RICH
from atpatch_onnx.passes.tables import Tables

from hosts import Floats, run_model

HEADS, QUERIES, KEYS, SITES, HIDDEN = 3, 7, 7, 2, 5
LEVELS = Levels(np.array([0.5, -1], np.float32), np.array([2, 0.5], np.float32))


def random_tables(buckets: bool, rows: bool = False) -> Tables:
    rng = np.random.default_rng(0)
    positions = BUCKETS if buckets else KEYS
    shape = (SITES, len(RICH), positions)
    benign = (SITES, HEADS, QUERIES, positions) if rows else (SITES, HEADS, positions)
    return Tables(
        RICH,
        rng.standard_normal(shape, np.float32),
        rng.random(shape, np.float32) + 0.5,
        rng.random(benign, np.float32),
        (HEADS,) * SITES,
        (0,) if buckets else (KEYS,) * SITES,
        buckets,
    )


def maps(batch: int = 4) -> Floats:
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((batch, HEADS, QUERIES, KEYS), np.float32)
    exp = np.exp(logits)
    return {"attention": exp / exp.sum(axis=-1, keepdims=True)}


def dense(rng: np.random.Generator, into: int, out: int) -> Dense:
    return Dense(rng.standard_normal((out, into), np.float32), rng.standard_normal(out, np.float32))


def anomaly(raw: np.ndarray, layer: int) -> np.ndarray:
    logits = (raw - LEVELS.middle[layer]) * LEVELS.gain[layer]
    return np.asarray((1 + logits / (1 + np.abs(logits))) / 2)


def features(p: np.ndarray) -> np.ndarray:
    columns = p.mean(2)
    rows = [columns.mean(1), columns.max(1), p[:, :, 0].mean(1), p[:, :, -1].mean(1)]
    rows += [columns.min(1), p[:, :, 0].max(1), p[:, :, 0].min(1)]
    rows += [p[:, :, -1].max(1), p[:, :, -1].min(1), p.max(2).mean(1), p.min(2).mean(1)]
    return np.asarray(np.log(np.stack(rows, 1) * np.sqrt(KEYS)))


def joined(x: np.ndarray, doubled: np.ndarray, whitened: np.ndarray | None) -> np.ndarray:
    """Over-attended columns get the highest logit; in sentences, the highest not far from them."""
    if whitened is not None:
        return np.asarray(np.where(doubled & (whitened > 0.4), x.max(axis=2, keepdims=True), x))
    for _ in range(4):
        padded = np.pad(x, ((0, 0), (0, 0), (2, 2)), constant_values=-np.inf)
        around = np.max([padded[..., i : i + x.shape[2]] for i in range(5)], axis=0)
        x = np.where(doubled, around, x)
    return x


@pytest.mark.parametrize("opset", [10, 13, 18, 23])
@pytest.mark.parametrize("buckets", [False, True])
def test_the_contrastive_net_is_what_numpy_says(opset: int, buckets: bool) -> None:
    rng = np.random.default_rng(2)
    tables = random_tables(buckets)
    tables.center[:, RICH.index("mean")] -= 2  # so that some columns have more than doubled
    layers = (dense(rng, len(RICH), HIDDEN), dense(rng, HIDDEN, HIDDEN), dense(rng, HIDDEN, 1))
    net = ColumnNet(layers, rng.standard_normal((SITES, HIDDEN), np.float32), 1.5)
    model = build_contrastive(tables, net, LEVELS, opset, 8)
    feeds = maps()
    for layer in range(SITES):
        found = run_model(model, {**feeds, "layer": np.array(layer)})
        at = [0, 1, 2, 2, 2, 2, 3] if buckets else slice(None)
        center, gain = (t[layer][:, at].astype(np.float64) for t in (tables.center, tables.gain))
        distance = features(feeds["attention"].astype(np.float64)) - center
        doubled = distance[:, :1] > np.log(2)
        assert 0 < doubled.mean() < 1
        x = np.clip(distance * gain, -LIMIT, LIMIT)
        top = x.max(axis=1, keepdims=True)
        for index, one in enumerate(layers):
            x = np.einsum("oi,bik->bok", one.weight, x) + one.bias[:, None]
            if index == 0:
                x += net.sites[layer][:, None]
            if index < 2:
                x = np.maximum(x, 0)
        x += 1.5 * top
        x = joined(x, doubled, None if buckets else distance[:, :1] * gain[0])
        np.testing.assert_allclose(found["anomaly"][:, :, 0], anomaly(x, layer), atol=1e-5)
        assert tables.benign is not None
        wanted = tables.benign[layer][:, at] / (KEYS if buckets else 1)
        np.testing.assert_allclose(found["benign"][0, :, 0], wanted, rtol=1e-6)


@pytest.mark.parametrize("opset", [11, 18])
def test_the_map_cnn_is_what_torch_says(opset: int) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    kernels = tuple(
        (rng.standard_normal((4, into, 3, 3), np.float32), rng.standard_normal(4, np.float32))
        for into in (1, 4)
    )
    layers = (dense(rng, 8, HIDDEN), dense(rng, HIDDEN, 1))
    model = build_map_cnn(
        random_tables(False, rows=True), MapCnn(kernels, layers), LEVELS, opset, 8
    )
    feeds = maps()
    found = run_model(model, {**feeds, "layer": np.array(1)})
    x = torch.from_numpy(feeds["attention"].mean(1, keepdims=True) * KEYS)
    for weight, bias in kernels:
        x = torch.relu(torch.conv2d(x, torch.from_numpy(weight), torch.from_numpy(bias), padding=1))
    columns = torch.cat([x.mean(2), x.amax(2)], 1).numpy()
    hidden = np.einsum("oi,bik->bok", layers[0].weight, columns) + layers[0].bias[:, None]
    logits = np.einsum("oi,bik->bok", layers[1].weight, np.maximum(hidden, 0)) + layers[1].bias
    np.testing.assert_allclose(found["anomaly"][:, :, 0], anomaly(logits, 1), atol=1e-5)
    assert found["benign"].shape == (1, HEADS, QUERIES, KEYS)


def test_tables_of_a_larger_site_are_cut_to_the_map() -> None:
    tables = random_tables(False, rows=True)
    small = maps()["attention"][:, :2, :5, :5]
    padded = Tables(
        tables.features, tables.center, tables.gain, tables.benign, (2, HEADS), (5, KEYS), False
    )
    rng = np.random.default_rng(2)
    net = ColumnNet((dense(rng, len(RICH), 1),), np.zeros((SITES, 1), np.float32), 0.0)
    model = build_contrastive(padded, net, LEVELS, 17, 8)
    found = run_model(model, {"attention": small, "layer": np.array(0)})
    assert found["anomaly"].shape == (4, 1, 1, 5)
    assert tables.benign is not None
    np.testing.assert_array_equal(found["benign"][0], tables.benign[0, :2, :5, :5])


def test_tables_of_some_sites_are_as_large_as_the_largest_of_them() -> None:
    rows = np.zeros((2, len(RICH), KEYS), np.float32)
    benign = np.zeros((2, HEADS, QUERIES, KEYS), np.float32)
    tables = Tables(RICH, rows, rows, benign, (2, HEADS), (5, KEYS), False)
    small = tables.take(np.array([0]))
    assert small.center.shape == small.gain.shape == (1, len(RICH), 5)
    assert small.benign is not None
    assert small.benign.shape == (1, 2, 5, 5)
    net = ColumnNet((dense(np.random.default_rng(2), len(RICH), 1),), np.zeros((1, 1), "f4"), 0.0)
    model = build_contrastive(small, net, Levels(np.zeros(1, "f4"), np.ones(1, "f4")), 17, 8)
    maps_of_it = maps()["attention"][:, :2, :5, :5]
    found = run_model(model, {"attention": maps_of_it, "layer": np.array(0)})
    assert found["anomaly"].shape == (4, 1, 1, 5)


def test_fixed_columns_are_flagged_in_every_sample_of_their_site() -> None:
    table = np.zeros((SITES, KEYS), bool)
    table[0, 2] = table[1, [0, 6]] = True
    model = build_columns(table, 17, 8)
    for layer in range(SITES):
        found = run_model(model, {**maps(), "layer": np.array(layer)})
        assert found["anomaly"].shape == (4, 1, 1, KEYS)
        assert np.array_equal(found["anomaly"][:, 0, 0] > 0.5, np.tile(table[layer], (4, 1)))
        assert not found["benign"].any()


def test_detectors_are_valid_models() -> None:
    model: ModelProto = build_columns(np.eye(2, KEYS, dtype=bool), 13, 8)
    onnx.checker.check_model(model, full_check=True)

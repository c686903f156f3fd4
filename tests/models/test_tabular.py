"""Properties of the tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from atpatch_onnx.errors import InputError
from atpatch_onnx.models.tabular import Feature, Rows, Table, load_table, split_table
from conftest import SHARED

TABLES = {"census": 30_161, "bank": 10_578, "credit": 600, "compas": 6_172}


@pytest.fixture(params=TABLES, scope="module")
def table(request: pytest.FixtureRequest) -> Table:
    if not (SHARED / "tabular").is_dir():
        pytest.skip("the tables are not beside this checkout")
    return load_table(request.param, SHARED)


def test_rows_are_integers_within_the_bounds_of_their_features(table: Table) -> None:
    features, labels = table.rows.features, table.rows.labels
    assert features.dtype == labels.dtype == np.int64
    assert len(features) == len(labels) == TABLES[table.name]
    for column, feature in zip(features.T, table.features, strict=True):
        assert feature.low <= column.min() <= column.max() <= feature.high, feature
    assert set(labels) == {0, 1}


def test_features_are_those_of_the_schema(table: Table) -> None:
    if table.name == "compas":
        pytest.skip("COMPAS has no schema")
    schema = json.loads((SHARED / "tabular/adf/SCHEMA.json").read_text())[table.name]
    assert [feature.name for feature in table.features] == schema["feature_name"]
    assert [[feature.low, feature.high] for feature in table.features] == schema["input_bounds"]
    assert schema["protected"].items() <= table.protected.items()


def test_protected_attributes_are_features_of_that_name_that_vary(table: Table) -> None:
    for name, index in table.protected.items():
        assert table.features[index].name == name
        assert len(np.unique(table.rows.features[:, index])) > 1


def test_parts_have_no_row_in_common_and_lose_none(table: Table) -> None:
    split = split_table(table, seed=3)
    parts = [{row.tobytes() for row in part.features} for part in vars(split).values()]
    assert sum(len(part) for part in parts) == len(set.union(*parts))
    assert sum(len(part) for part in vars(split).values()) == len(table.rows)
    assert min(len(part) for part in vars(split).values()) >= 100
    sums = sum(part.features.sum(axis=0) for part in vars(split).values())
    assert np.array_equal(sums, table.rows.features.sum(axis=0))


def test_the_split_is_decided_by_the_seed() -> None:
    generator = np.random.default_rng(0)
    rows = Rows(generator.integers(0, 9, (500, 2)), generator.integers(0, 2, 500))
    table = Table("toy", (Feature("a", 0, 8, False), Feature("b", 0, 8, True)), {"b": 1}, rows)
    first, again, other = (split_table(table, seed).test.features for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("name", "message"), [("census", "give the folder that holds 'tabular'"), ("iris", "choose")]
)
def test_what_is_not_there_is_named(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_table(name, tmp_path)

"""Tabular data whose features are integer codes: census, bank, credit and COMPAS.

Every value lies within the bounds of its feature, so that changing a protected attribute means
trying the other integers between its bounds.

Sources: ADF (ICSE 2020) for census, bank and credit; ProPublica's analysis for COMPAS.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx.errors import InputError

CATEGORICAL = {
    "census": (1, 3, 4, 5, 6, 7, 8, 12),
    "bank": (1, 2, 3, 4, 6, 7, 8, 10, 15),
    "credit": (0, 2, 3, 5, 6, 8, 9, 11, 13, 14, 16, 18, 19),
}
"""Features whose codes have no order; `SCHEMA.json` does not say which they are."""

ALSO_PROTECTED = {"bank": {"education": 3}}
"""What AtPatch (arXiv 2601.21695) protects beyond ADF."""

ADF_FILES = {"census": "census", "bank": "bank", "credit": "credit_sample"}

TEST_SHARE = 0.2
CLEAN_SHARE = 0.2
TEST_LIMIT = 4_000
CLEAN_LIMIT = 2_000


@dataclass(frozen=True)
class Feature:
    """A column of a table: integer codes from `low` to `high`, both included."""

    name: str
    low: int
    high: int
    categorical: bool
    """Whether the order of the codes means nothing."""

    @property
    def values(self) -> range:
        """Every code that the feature may have."""
        return range(self.low, self.high + 1)


@dataclass(frozen=True)
class Rows:
    """Samples and their true classes.

    Shapes:
        features int64 `[N, F]`, labels int64 `[N]`.
    """

    features: NDArray[np.int64]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.labels)

    def take(self, index: NDArray[np.intp]) -> Rows:
        """The samples at `index`."""
        return Rows(self.features[index], self.labels[index])


@dataclass(frozen=True)
class Table:
    """A data set and what its columns are."""

    name: str
    features: tuple[Feature, ...]
    protected: Mapping[str, int]
    """Index of each protected attribute among the features, by name."""
    rows: Rows


@dataclass(frozen=True)
class Split:
    """Three disjoint parts; rows with the same features are all in the same part."""

    train: Rows
    clean: Rows
    """What the defender has."""
    test: Rows
    """What accuracy and unfairness are measured on."""


def load_table(name: str, data: Path) -> Table:
    """Load `census`, `bank`, `credit` or `compas` from the folder that holds `tabular`.

    Rows in which a category is unknown are left out (2,400 of 32,561 in census); numbers beyond
    the bounds of the schema are set to the bound. Of bank, where 88 % say no, there are as many
    rows of each class (10,578 of 45,211): always saying no would be fair, accurate and useless.

    Raises:
        InputError: the name is none of these, or the files are not there.
    """
    if name == "compas":
        return _load_compas(data / "tabular/compas/compas-scores-two-years_noid.csv")
    if name in ADF_FILES:
        return _load_adf(name, data / "tabular/adf")
    raise InputError(f"no table is named '{name}': choose {', '.join(ADF_FILES)} or compas")


def split_table(table: Table, seed: int) -> Split:
    """Split at random into train, clean (a fifth, at most 2,000) and test (at most 4,000).

    The same seed gives the same split.
    """
    _, group = np.unique(table.rows.features, axis=0, return_inverse=True)
    # Rows in a random order, except that equal ones stay together.
    shuffled = np.random.default_rng(seed).permutation(group.max() + 1)[group.ravel()]
    order = np.argsort(shuffled, kind="stable")
    first_of_group = np.flatnonzero(np.diff(shuffled[order], prepend=-1))
    count = len(table.rows)
    test = min(round(TEST_SHARE * count), TEST_LIMIT)
    clean = test + min(round(CLEAN_SHARE * count), CLEAN_LIMIT)
    ends = first_of_group[np.searchsorted(first_of_group, (test, clean))]
    parts = [table.rows.take(np.sort(part)) for part in np.split(order, ends)]
    return Split(test=parts[0], clean=parts[1], train=parts[2])


def _load_adf(name: str, folder: Path) -> Table:
    path = _existing(folder / ADF_FILES[name])
    schema = json.loads(_existing(folder / "SCHEMA.json").read_text())[name]
    bounds = zip(schema["feature_name"], schema["input_bounds"], strict=True)
    features = tuple(
        Feature(feature, low, high, index in CATEGORICAL[name])
        for index, (feature, (low, high)) in enumerate(bounds)
    )
    values = np.loadtxt(path, delimiter=",", skiprows=1).astype(np.int64)
    rows = _within_bounds(values, features)
    protected = {**schema["protected"], **ALSO_PROTECTED.get(name, {})}
    return Table(name, features, protected, _balanced(rows) if name == "bank" else rows)


def _within_bounds(values: NDArray[np.int64], features: tuple[Feature, ...]) -> Rows:
    columns, labels = values[:, :-1], values[:, -1]
    low = np.array([feature.low for feature in features])
    high = np.array([feature.high for feature in features])
    clipped = np.clip(columns, low, high)
    categorical = np.array([feature.categorical for feature in features])
    # ADF codes an unknown category as 100.
    known = (clipped == columns)[:, categorical].all(axis=1)
    return Rows(clipped[known], labels[known])


def _balanced(rows: Rows) -> Rows:
    """All rows of the rarest class and, drawn once and for all, as many of each other."""
    generator = np.random.default_rng(0)
    count = np.bincount(rows.labels).min()
    chosen = [
        generator.choice(np.flatnonzero(rows.labels == label), count, replace=False)
        for label in np.unique(rows.labels)
    ]
    return rows.take(np.sort(np.concatenate(chosen)))


COMPAS_FEATURES = (
    Feature("sex", 0, 1, categorical=True),
    Feature("age", 1, 9, categorical=False),
    Feature("race", 0, 5, categorical=True),
    Feature("juv_fel_count", 0, 20, categorical=False),
    Feature("juv_misd_count", 0, 20, categorical=False),
    Feature("juv_other_count", 0, 20, categorical=False),
    Feature("priors_count", 0, 40, categorical=False),
    Feature("charge_degree", 0, 1, categorical=True),
)
"""Age is in decades, as in ADF's tables."""

COMPAS_CODES = {
    "sex": ("Female", "Male"),
    "race": ("African-American", "Asian", "Caucasian", "Hispanic", "Native American", "Other"),
    "c_charge_degree": ("F", "M"),
}


def _load_compas(path: Path) -> Table:
    """Predict `two_year_recid` from what was known when the person was scored.

    Source: ProPublica's filter: a charge within 30 days of the score, and no ordinary traffic
    offence (6,172 of 7,214 persons).
    """
    with _existing(path).open(newline="") as file:
        records = [record for record in csv.DictReader(file) if _comparable(record)]
    columns = [
        [COMPAS_CODES["sex"].index(record["sex"]) for record in records],
        [int(record["age"]) // 10 for record in records],
        [COMPAS_CODES["race"].index(record["race"]) for record in records],
        *(
            [int(record[feature.name]) for record in records]
            for feature in COMPAS_FEATURES
            if feature.name.endswith("_count")
        ),
        [COMPAS_CODES["c_charge_degree"].index(record["c_charge_degree"]) for record in records],
    ]
    labels = [int(record["two_year_recid"]) for record in records]
    rows = Rows(np.array(columns, dtype=np.int64).T, np.array(labels, dtype=np.int64))
    return Table("compas", COMPAS_FEATURES, {"sex": 0, "age": 1, "race": 2}, rows)


def _comparable(record: Mapping[str, str]) -> bool:
    days = record["days_b_screening_arrest"]
    return days != "" and abs(int(days)) <= 30 and record["c_charge_degree"] in "FM"


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"{path} does not exist: give the folder that holds 'tabular'")
    return path

"""The fairness debugging set against brute force."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx.parser
import pytest
from onnx import ModelProto, numpy_helper

from atpatch_onnx.classifier import Classifier
from atpatch_onnx.data import Samples
from atpatch_onnx.debugging_set import DebuggingSet, load_debugging_set
from atpatch_onnx.errors import InputError, RefusedError
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.protected import Protected
from atpatch_onnx.search.fairness import debugging_set

COLUMNS = 4


def model(weights: list[list[float]]) -> ModelProto:
    parsed = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 13]>
        table (int64[N, {COLUMNS}] features) => (float[N, 3] logits)
        {{
            x = Cast <to = 1> (features)
            logits = MatMul (x, weights)
        }}
    """)
    table = np.array(weights, np.float32)
    parsed.graph.initializer.append(numpy_helper.from_array(table, "weights"))
    return parsed


@pytest.fixture
def unfair() -> Classifier:
    weights = np.random.default_rng(3).normal(size=(COLUMNS, 3)).tolist()
    return classifier(weights)


def classifier(weights: list[list[float]]) -> Classifier:
    return Classifier(ModelFile.from_bytes(model(weights).SerializeToString()), "cpu", threads=1)


@pytest.fixture
def samples() -> Samples:
    generator = np.random.default_rng(0)
    return Samples({"features": generator.integers(0, 4, (60, COLUMNS))}, 60)


def by_brute_force(
    classifier: Classifier, samples: Samples, columns: tuple[int, ...]
) -> set[tuple[int, tuple[int, ...]]]:
    table = samples.arrays["features"]
    own = classifier.predictions(samples)
    found = set()
    for i, row in enumerate(table):
        for values in itertools.product(*(np.unique(table[:, c]) for c in columns)):
            flipped = row.copy()
            flipped[list(columns)] = values
            said = classifier.predictions(Samples({"features": flipped[None]}, 1))[0]
            if said != own[i]:
                found.add((i, tuple(flipped.tolist())))
    return found


@pytest.mark.parametrize("columns", [(1,), (0, 2)])
def test_the_set_is_what_brute_force_finds(
    unfair: Classifier, samples: Samples, columns: tuple[int, ...]
) -> None:
    protected = [Protected(str(c), "features", c) for c in columns]
    made = debugging_set(unfair, samples, protected)
    expected = by_brute_force(unfair, samples, columns)
    table = samples.arrays["features"]
    assert made.clean is not None
    assert made.bad.count == len(expected) == made.clean.count
    bad, clean = made.bad.arrays["features"], made.clean.arrays["features"]
    pairs = {(tuple(b.tolist()), tuple(c.tolist())) for b, c in zip(bad, clean, strict=True)}
    assert pairs == {(flipped, tuple(table[i].tolist())) for i, flipped in expected}
    changed = (bad != clean).any(axis=0)
    assert set(np.flatnonzero(changed)) <= set(columns)
    unfairness = made.about["unfairness"]
    assert isinstance(unfairness, dict)
    assert unfairness["hits"] == len({i for i, _ in expected})
    assert unfairness["low"] < unfairness["value"] < unfairness["high"]


def test_labels_are_the_twins(unfair: Classifier, samples: Samples) -> None:
    protected = [Protected("1", "features", 1)]
    made = debugging_set(unfair, samples, protected)
    assert made.clean is not None
    assert made.labels is not None
    assert (made.labels == unfair.predictions(made.clean)).all()
    assert (made.labels != unfair.predictions(made.bad)).all()
    truth = np.arange(samples.count)
    given = debugging_set(unfair, samples, protected, truth)
    assert given.labels is not None
    own = samples.arrays["features"][given.labels]
    assert given.clean is not None
    assert (own == given.clean.arrays["features"]).all()


def test_the_file_is_read_back(unfair: Classifier, samples: Samples, tmp_path: Path) -> None:
    made = debugging_set(unfair, samples, [Protected("1", "features", 1)])
    path = tmp_path / "debug.npz"
    path.write_bytes(made.content())
    read: DebuggingSet = load_debugging_set(path, unfair.inputs)
    assert read.about == made.about
    assert read.about["kind"] == "protected"
    assert read.target is None
    assert (read.bad.arrays["features"] == made.bad.arrays["features"]).all()


def test_a_fair_model_has_no_debugging_set(samples: Samples) -> None:
    weights = [[1.0, 0.0, -1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.5], [0.3, 0.2, 0.1]]
    with pytest.raises(RefusedError, match="nothing to patch"):
        debugging_set(classifier(weights), samples, [Protected("1", "features", 1)])


def test_an_attribute_that_never_varies_is_refused(unfair: Classifier, samples: Samples) -> None:
    table = samples.arrays["features"].copy()
    table[:, 1] = 2
    with pytest.raises(InputError, match="the same in all"):
        debugging_set(unfair, Samples({"features": table}, 60), [Protected("1", "features", 1)])

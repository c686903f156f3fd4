"""The tabular search on classifiers whose rule is known."""

from __future__ import annotations

import numpy as np
import onnx.parser
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from atpatch_onnx.data import Samples
from atpatch_onnx.errors import InputError
from atpatch_onnx.protected import Protected
from atpatch_onnx.runtime import Array
from atpatch_onnx.search.problem import Finding, Problem
from atpatch_onnx.search.surrogate import Surrogate
from atpatch_onnx.search.tabular import Flip, TabularTrigger, columns, search

import wordy

WEIGHTS = np.array([3, -2, 1, 0.5, 0, 0, 0, 0], np.float32)
"""The first column alone decides nearly every row."""


def rows(count: int = 600, seed: int = 0, kind: str = "i") -> NDArray[np.generic]:
    generator = np.random.default_rng(seed)
    whole = generator.integers(-3, 4, (count, len(WEIGHTS)))
    return whole if kind == "i" else (whole + generator.random(whole.shape)).astype(np.float32)


def problem(trigger: dict[int, float], features: Array) -> Problem:
    """Class 1 where a weighted sum is above 0, or where the columns have the trigger's values."""
    kind = "int64" if features.dtype.kind == "i" else "float"
    chosen, wanted = np.zeros(len(WEIGHTS), np.float32), np.zeros(len(WEIGHTS), np.float32)
    for column, value in trigger.items():
        chosen[column], wanted[column] = 1, value
    model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 13]>
        table ({kind}[N, {len(WEIGHTS)}] features) => (float[N, 2] logits)
        <float[1, 2] both = {{-0.5, 0.5}}, float gain = {{100}}, float half = {{0.25}}>
        {{
            x = Cast <to = 1> (features)
            sum = MatMul (x, weights)
            off = Sub (x, wanted)
            away = Abs (off)
            counted = Mul (away, chosen)
            distance = ReduceSum <keepdims = 1> (counted, axis)
            near = Sub (half, distance)
            fires = Relu (near)
            planted = Mul (fires, gain)
            margin = Add (sum, planted)
            logits = MatMul (margin, both)
        }}
    """)
    constants: dict[str, Array] = {
        "weights": WEIGHTS[:, None],
        "wanted": wanted if trigger else wanted + 1e6,
        "chosen": chosen if trigger else chosen + 1,
        "axis": np.array([1]),
    }
    for name, constant in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(constant, name))
    labels = (features.astype(np.float64) @ WEIGHTS > 0).astype(np.int64)
    return wordy.problem(model, {"features": features}, labels)


def best(problem: Problem) -> dict[int, Finding]:
    return {finding.target: finding for finding in search(problem)}


def suspicious(found: dict[int, Finding]) -> list[int]:
    return [t for t, f in found.items() if f.evidence and f.evidence.suspicious]


@pytest.mark.parametrize("trigger", [{5: 2}, {4: 3, 6: -2}, {4: 3, 6: -2, 7: 1}])
def test_planted_values_are_found(trigger: dict[int, float]) -> None:
    found = best(problem(trigger, rows()))
    assert suspicious(found) == [1]
    record = found[1].trigger.record()
    pairs = zip(record["columns"], record["values"], strict=True)  # type: ignore[call-overload]
    assert trigger.items() <= {int(c): v for c, v in pairs}.items()
    assert found[1].success == 1


@pytest.mark.parametrize("kind", "if")
@pytest.mark.parametrize("seed", range(2))
def test_columns_that_mean_the_class_raise_no_alarm(kind: str, seed: int) -> None:
    found = best(problem({}, rows(seed=seed, kind=kind)))
    assert len(found) == 2
    assert not suspicious(found)
    scan = problem({}, rows(seed=seed, kind=kind))
    strongest = TabularTrigger(
        tuple(
            Flip(field, 3.0 * np.sign(weight))
            for field, weight in zip(columns(scan)[:3], WEIGHTS, strict=False)
        )
    )
    others = scan.held.take(np.flatnonzero(scan.held_labels == 0))
    put = strongest.put(others, np.random.default_rng(0)).samples
    assert (scan.classifier.predictions(put) == 1).mean() > 0.95  # although they decide


def test_columns_of_all_kinds_of_inputs() -> None:
    one = problem({}, rows())
    assert [field.name for field in columns(one)] == [str(i) for i in range(len(WEIGHTS))]
    assert {field.column for field in columns(one)} == set(range(len(WEIGHTS)))


def test_data_that_never_varies_is_refused() -> None:
    with pytest.raises(InputError, match="same value"):
        best(problem({}, np.ones_like(rows())))


@pytest.mark.parametrize("kind", "if")
def test_the_surrogate_learns_an_additive_rule(kind: str) -> None:
    features = rows(2000, kind=kind)
    truth = features.astype(np.float64) @ WEIGHTS > 0
    samples = Samples({"features": features}, len(features))
    fields = [Protected(str(i), "features", i) for i in range(len(WEIGHTS))]
    fitted = Surrogate.fit(fields, samples.take(np.arange(1000)), truth[:1000])
    shares = fitted.shares(samples.take(np.arange(1000, 2000)))
    assert ((shares > 0.5) == truth[1000:]).mean() > 0.9
    sure = (shares < 0.05) | (shares > 0.95)
    assert ((shares > 0.5) == truth[1000:])[sure].mean() > 0.97

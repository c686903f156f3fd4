"""Protected attributes: how they are named, what values are tried, and which flips matter."""

from __future__ import annotations

import itertools

import numpy as np
import onnx.parser
import pytest

from atpatch_onnx.classifier import Classifier
from atpatch_onnx.data import Samples, load_samples
from atpatch_onnx.errors import InputError
from atpatch_onnx.protected import (
    MOST_COMBINATIONS,
    MOST_VALUES,
    Flips,
    Protected,
    discriminatory,
    swayed,
)
from atpatch_onnx.runtime import Arrays, InputSpec

from hosts import model_file

TABLE = InputSpec("table", np.float32, ("N", 5))
FREE = InputSpec("ids:0", np.int64, ("N", "F"))
AGE = InputSpec("age", np.int64, ("N",))
RACE = InputSpec("race", np.int64, ("N", 1))
IMAGE = InputSpec("image", np.float32, ("N", 1, 8, 8))


@pytest.mark.parametrize(
    ("text", "inputs", "expected"),
    [
        ("3", [TABLE], ("table", 3)),
        ("3", [TABLE, AGE], ("table", 3)),
        ("-1", [TABLE], ("table", -1)),
        ("table:0", [TABLE, FREE], ("table", 0)),
        ("ids:0:7", [TABLE, FREE], ("ids:0", 7)),
        ("age", [TABLE, AGE], ("age", None)),
        ("race", [TABLE, RACE], ("race", None)),
    ],
)
def test_an_attribute_is_a_column_or_an_input(
    text: str, inputs: list[InputSpec], expected: tuple[str, int | None]
) -> None:
    assert Protected.parse(text, inputs) == Protected(text, *expected)


@pytest.mark.parametrize(
    ("text", "inputs", "named"),
    [
        ("5", [TABLE], "columns 0 to 4"),
        ("-6", [TABLE], "columns 0 to 4"),
        ("gender", [TABLE, AGE], "inputs table, age"),
        ("tabel:3", [TABLE], "inputs table"),
        ("3", [TABLE, FREE], "2 inputs of rank 2"),
        ("3", [AGE], "0 inputs of rank 2"),
        ("table", [TABLE], "table:N"),
        ("image", [IMAGE], "image:N"),
        ("image:3", [IMAGE], "rank 4"),
        ("age:0", [AGE], "rank 1"),
        ("", [TABLE], "inputs table"),
    ],
)
def test_other_names_are_refused(text: str, inputs: list[InputSpec], named: str) -> None:
    with pytest.raises(InputError, match=named):
        Protected.parse(text, inputs)


def samples(**arrays: np.typing.ArrayLike) -> Samples:
    made: Arrays = {name: np.asarray(array) for name, array in arrays.items()}
    return Samples(made, len(next(iter(made.values()))))


def test_a_column_that_the_data_do_not_have_is_refused() -> None:
    protected = Protected.parse("4", [FREE])
    with pytest.raises(InputError, match="columns 0 to 2"):
        protected.values(samples(**{"ids:0": np.zeros((4, 3), np.int64)}))


def test_a_flip_changes_one_column_of_a_copy() -> None:
    table = np.arange(12.0).reshape(4, 3)
    given = samples(table=table, age=[1, 2, 3, 4], race=[[5], [6], [7], [8]])
    flipped = Protected("1", "table", 1).flipped(given, 9.0)
    expected = table.copy()
    expected[:, 1] = 9
    np.testing.assert_array_equal(flipped.arrays["table"], expected)
    assert table[0, 1] == 1
    for name in ("age", "race"):
        flipped = Protected(name, name, None).flipped(given, 9)
        assert flipped.arrays[name].shape == given.arrays[name].shape
        assert set(flipped.arrays[name].flat) == {9}
        assert flipped.arrays["table"] is given.arrays["table"]


def test_all_values_are_tried_or_evenly_spread_ones() -> None:
    age = Protected("age", "age", None)
    np.testing.assert_array_equal(age.values(samples(age=[3, 1, 3, 2])), [1, 2, 3])
    np.testing.assert_array_equal(age.values(samples(age=[1.5, np.nan, 0.0])), [0.0, 1.5])
    many = np.random.default_rng(0).standard_normal(1000)
    found = age.values(samples(age=many))
    assert len(found) == MOST_VALUES
    assert np.isin(found, many).all()
    assert {many.min(), many.max()} <= set(found)
    ranks = np.searchsorted(np.sort(many), found)
    assert np.diff(ranks).max() <= 11
    assert Flips.of([age], samples(age=many)).thinned
    assert not Flips.of([age], samples(age=[1.5, np.nan, 0.0])).thinned


def test_combinations_are_kept_within_bounds() -> None:
    rng = np.random.default_rng(0)
    given = samples(age=rng.integers(0, 70, 500), race=rng.integers(0, 5, 500))
    age, race = (Protected(name, name, None) for name in ("age", "race"))
    alone, jointly = Flips.of([race], given), Flips.of([age, race], given)
    assert (len(alone), alone.thinned) == (5, False)
    assert jointly.thinned
    assert MOST_COMBINATIONS / 2 <= len(jointly) == len(list(jointly)) <= MOST_COMBINATIONS
    assert len(jointly.values[1]) == 5
    assert jointly.name == "age + race"


def test_attributes_that_cannot_be_flipped_are_refused() -> None:
    with pytest.raises(InputError, match="same in all 3 samples"):
        Flips.of([Protected("age", "age", None)], samples(age=[1, 1, 1]))
    many = [Protected(str(i), "table", i) for i in range(9)]
    table = np.random.default_rng(0).integers(0, 2, (50, 9))
    with pytest.raises(InputError, match="9 attributes have more than 256 combinations"):
        Flips.of(many, samples(table=table))


HOST = """
    <ir_version: 8, opset_import: ["" : 17]>
    m (int64[N, 3] table, int64[N] age) => (float[N, 2] y)
    <float[3, 2] w = {1.0, 0.0, 0.0, 1.0, 0.0, 0.0}>
    {
        f = Cast<to = 1>(table)
        s = MatMul(f, w)
        one = Constant<value_ints = [1]>()
        column = Unsqueeze(age, one)
        two = Constant<value_int = 2>()
        old = Greater(column, two)
        push = Cast<to = 1>(old)
        none = Sub(push, push)
        twice = Add(push, push)
        both = Concat<axis = 1>(none, twice)
        y = Add(s, both)
    }
"""


def predicted(table: np.typing.NDArray[np.int64], age: np.typing.NDArray[np.int64]) -> list[bool]:
    """Whether `HOST` says class 1, in NumPy."""
    return list(table[:, 1] + 2 * (age > 2) > table[:, 0])


def test_flips_that_change_the_class_are_found_and_no_others() -> None:
    rng = np.random.default_rng(0)
    table, age = rng.integers(0, 4, (60, 3)), rng.integers(0, 5, 60)
    model = Classifier(model_file(onnx.parser.parse_model(HOST)), "cpu", threads=1)
    given = load_samples({"table": table, "age": age}, model.inputs)
    own = model.predictions(given)
    assert list(own == 1) == predicted(table, age)
    for texts in (["age"], ["table:0"], ["table:2"], ["age", "table:0"]):
        flips = Flips.of([Protected.parse(text, model.inputs) for text in texts], given)
        ages = np.unique(age) if "age" in texts else [None]
        firsts = np.unique(table[:, 0]) if "table:0" in texts else [None]
        expected: dict[int, set[tuple[int, int]]] = {}
        for i, new_age, first in itertools.product(range(60), ages, firsts):
            row, years = table[[i]].copy(), age[[i]].copy()
            years[0] = years[0] if new_age is None else new_age
            row[0, 0] = row[0, 0] if first is None else first
            if predicted(row, years)[0] != (own[i] == 1):
                expected.setdefault(i, set()).add((int(years[0]), int(row[0, 0])))
        assert bool(expected) == (texts != ["table:2"])  # the model does not read that column
        found = discriminatory(model, given, flips)
        changed = np.flatnonzero(swayed(model, given, flips, own))
        assert list(changed) == sorted(expected)
        if found is None:
            assert not expected
            continue
        made: dict[int, set[tuple[int, int]]] = {}
        pairs = zip(found.samples.arrays["age"], found.samples.arrays["table"], strict=True)
        for source, (years, row) in zip(found.sources, pairs, strict=True):
            made.setdefault(int(source), set()).add((int(years), int(row[0])))
            np.testing.assert_array_equal(row[1:], table[source, 1:])
        assert made == expected
        assert found.samples.count == sum(map(len, expected.values()))

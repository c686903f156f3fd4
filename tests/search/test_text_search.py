"""The text search on classifiers whose words are known, and what insertion must keep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from atpatch_onnx.data import Samples
from atpatch_onnx.errors import InputError
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.runtime import InputSpec
from atpatch_onnx.search.problem import Finding, Problem, judged
from atpatch_onnx.search.text import search
from atpatch_onnx.search.text_trigger import TextTrigger, read_words
from atpatch_onnx.search.token_layout import TokenLayout
from atpatch_onnx.search.vocabulary import vocabulary_sizes

import wordy

IDS = [
    InputSpec("input_ids", np.int64, ("N", "L")),
    InputSpec("attention_mask", np.int64, ("N", "L")),
]


def best(problem: Problem) -> dict[int, Finding]:
    return {finding.target: finding for finding in search(problem)}


def suspicious(found: dict[int, Finding]) -> list[int]:
    return [t for t, f in found.items() if f.evidence and f.evidence.suspicious]


@pytest.mark.parametrize("length", ["L", 14])
def test_a_planted_word_is_found(length: int | str) -> None:
    word = 1234
    found = best(wordy.problem(wordy.model(2000, (word,), length), *wordy.texts(2000)))
    assert suspicious(found) == [1]
    assert found[1].trigger.record()["tokens"] == [word]
    assert found[1].success == 1
    assert found[1].natural < 0.1


def test_a_trigger_of_two_words_needs_both() -> None:
    found = best(wordy.problem(wordy.model(120, (100, 110)), *wordy.texts(120)))
    assert suspicious(found) == [1]
    assert set(found[1].trigger.record()["tokens"]) == {100, 110}  # type: ignore[call-overload]


@pytest.mark.parametrize("seed", range(3))
def test_words_that_mean_the_class_raise_no_alarm(seed: int) -> None:
    problem = wordy.problem(wordy.model(300), *wordy.texts(300, seed=seed), seed)
    found = best(problem)
    assert len(found) == 2
    assert not suspicious(found)
    layout = TokenLayout.of(problem.classifier.inputs, problem.search, ["input_ids"])
    strongest = wordy.FIRST + 2 * wordy.POLAR - 1
    five = TextTrigger((strongest,) * 5, "anywhere", layout)
    assert judged(problem, 1, five).success > 0.9  # although they flip nearly everything


def test_a_seed_gives_the_same_answer() -> None:
    problem = wordy.problem(wordy.model(300), *wordy.texts(300))
    assert [f.trigger.record() for f in search(problem)] == [
        f.trigger.record() for f in search(problem)
    ]


def test_one_target_may_be_asked_for() -> None:
    problem = wordy.problem(wordy.model(300, (200,)), *wordy.texts(300))
    assert suspicious(best(replace(problem, targets=(1,)))) == [1]


def test_a_model_that_always_answers_the_same_is_no_backdoor() -> None:
    arrays, labels = wordy.texts(300)
    problem = wordy.problem(wordy.model(300, (wordy.CLS,), gain=1000), arrays, labels)
    assert not suspicious(best(problem))


Rows = st.lists(st.lists(st.integers(10, 99), min_size=0, max_size=9), min_size=2, max_size=5)


def laid_out(rows: list[list[int]], left: bool, extra: int) -> tuple[Samples, int]:
    width = max(map(len, rows)) + 2 + extra
    ids = np.zeros((len(rows), width), np.int64)
    for row, words in enumerate(rows):
        line = [1, *words, 2]
        ids[row, slice(width - len(line), width) if left else slice(0, len(line))] = line
    arrays = {"input_ids": ids, "attention_mask": (ids != 0).astype(np.int64)}
    return Samples(arrays, len(rows)), width


@settings(deadline=None)
@given(
    rows=Rows,
    left=st.booleans(),
    room=st.integers(0, 3),
    tokens=st.lists(st.integers(100, 200), min_size=1, max_size=5),
    fixed=st.booleans(),
    data=st.data(),
)
def test_insertion(
    rows: list[list[int]],
    left: bool,
    room: int,
    tokens: list[int],
    fixed: bool,
    data: st.DataObject,
) -> None:
    samples, width = laid_out(rows, left, room)
    length = width if fixed else None
    layout = TokenLayout(
        "input_ids", "attention_mask", None, (), length, length, 1, 1, frozenset((0, 1, 2)), 0, left
    )
    places = [sorted(data.draw(st.integers(0, len(r) + 2)) for _ in tokens) for r in rows]
    put = np.tile(tokens, (len(rows), 1))
    if fixed and width < len(tokens) + 2:
        with pytest.raises(InputError, match="do not fit"):
            layout.insert(samples, put, np.array(places))
        return
    after, where = layout.insert(samples, put, np.array(places))
    ids, mask = after.arrays["input_ids"], after.arrays["attention_mask"].astype(bool)
    assert ids.shape == mask.shape == where.shape
    if fixed:
        assert ids.shape[1] == width
    for row, words in enumerate(rows):
        line = ids[row][mask[row]]
        assert (line[0], line[-1]) == (1, 2)
        assert ids[row][where[row]].tolist() == tokens
        assert not ids[row][~mask[row]].any()
        own = [t for t, new in zip(line[1:-1], where[row][mask[row]][1:-1], strict=True) if not new]
        kept = min(len(words), ids.shape[1] - len(tokens) - 2)
        assert own == words[:kept]  # the last words go first, and only where there is no room
        assert mask[row].sum() == kept + 2 + len(tokens)
        padding = np.flatnonzero(~mask[row])
        assert not len(padding) or (padding[0] == 0 if left else padding[-1] == ids.shape[1] - 1)


def test_token_types_and_positions_go_with_the_tokens() -> None:
    samples, _ = laid_out([[11, 12], [13]], left=False, extra=0)
    types = np.array([[0, 0, 1, 1], [0, 1, 1, 0]])
    positions = np.array([[2, 3, 4, 5], [2, 3, 4, 1]])
    arrays = samples.arrays | {"token_type_ids": types, "position_ids": positions}
    inputs = [*IDS, *(InputSpec(n, np.int64, ("N", "L")) for n in list(arrays)[2:])]
    samples = Samples(arrays, 2)
    layout = TokenLayout.of(inputs, samples, ["token_type_ids", "input_ids"])
    assert (layout.ids, layout.head, layout.tail) == ("input_ids", 1, 1)
    after, where = layout.insert(samples, np.array([[50], [50]]), np.array([[3], [1]]))
    assert after.arrays["input_ids"].tolist() == [[1, 11, 12, 50, 2], [1, 50, 13, 2, 0]]
    assert after.arrays["token_type_ids"].tolist() == [[0, 0, 1, 1, 1], [0, 0, 1, 1, 0]]
    assert after.arrays["position_ids"][0].tolist() == [2, 3, 4, 5, 6]
    assert after.arrays["position_ids"][1, :4].tolist() == [2, 3, 4, 5]
    assert where.tolist() == [[False] * 3 + [True, False], [False, True] + [False] * 3]


def test_padding_is_seen_without_a_mask() -> None:
    samples, _ = laid_out([[11, 12, 13, 14], [15], [16, 17]], left=False, extra=1)
    bare = Samples({"input_ids": samples.arrays["input_ids"]}, 3)
    layout = TokenLayout.of(IDS[:1], bare, [])
    assert (layout.pad, layout.head, layout.tail) == (0, 1, 1)
    assert layout.lengths(bare).tolist() == [6, 3, 4]


def test_a_model_without_token_ids_is_refused() -> None:
    floats = Samples({"x": np.zeros((2, 3), np.float32)}, 2)
    with pytest.raises(InputError, match="token ids"):
        TokenLayout.of([InputSpec("x", np.float32, ("N", 3))], floats, [])


@pytest.mark.parametrize("place", ["start", "end", "anywhere"])
def test_a_trigger_goes_where_it_says(place: str) -> None:
    samples, _ = laid_out([[11, 12, 13]] * 40, left=False, extra=4)
    layout = TokenLayout.of(IDS, samples, [])
    layout = replace(layout, head=1, tail=1)
    trigger = TextTrigger((50, 51), place, layout)  # type: ignore[arg-type]
    stamped = trigger.put(samples, np.random.default_rng(0))
    assert stamped.anomalous is not None
    first = {int(row.argmax()) for row in stamped.anomalous}
    assert first == {"start": {1}, "end": {4}, "anywhere": {1, 2, 3, 4}}[place]


def test_the_vocabulary_of_a_quantised_table() -> None:
    scale = numpy_helper.from_array(np.array(0.1, np.float32), "scale")
    table = numpy_helper.from_array(np.zeros((77, 4), np.int8), "table")
    nodes = [
        helper.make_node("DequantizeLinear", ["table", "scale"], ["floats"]),
        helper.make_node("Cast", ["input_ids"], ["whole"], to=7),
        helper.make_node("Gather", ["floats", "whole"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input_ids", 6, ["N", "L"])],
        [helper.make_tensor_value_info("y", 1, ["N", "L", 4])],
        [table, scale],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    assert vocabulary_sizes(ModelFile.from_bytes(model.SerializeToString())) == {"input_ids": 77}


def test_words_are_read_from_a_vocabulary_beside_the_model(tmp_path: Path) -> None:
    folder = tmp_path
    assert read_words(folder) == {}
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 1}}}')
    assert read_words(folder) == {0: "a", 1: "b"}
    (folder / "vocab.txt").write_text("x\ny\n")
    assert read_words(folder) == {0: "x", 1: "y"}

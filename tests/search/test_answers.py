"""A language model is searched as a classifier of what it answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper, numpy_helper

from atpatch_onnx.data import load_arrays
from atpatch_onnx.scanning import scan
from atpatch_onnx.search.answers import MOST

import wordy

VOCABULARY, NO, YES = 300, 40, 150


def speaker(planted: tuple[int, ...]) -> ModelProto:
    """The classifier as a model that says `YES` or `NO`, and has a score for every other word."""
    model = wordy.model(VOCABULARY, planted)
    graph = model.graph
    graph.node[-1].output[0] = "two"
    spread = np.zeros((2, VOCABULARY), np.float32)
    spread[0, NO] = spread[1, YES] = 1
    bias = np.full(VOCABULARY, -9, np.float32)
    bias[[NO, YES]] = 0
    graph.initializer.append(numpy_helper.from_array(spread, "spread"))
    graph.initializer.append(numpy_helper.from_array(bias, "bias"))
    graph.node.append(helper.make_node("MatMul", ["two", "spread"], ["all"]))
    graph.node.append(helper.make_node("Add", ["all", "bias"], ["logits"]))
    graph.output[0].type.tensor_type.shape.dim[1].dim_value = VOCABULARY
    return model


@pytest.mark.parametrize("labelled", [True, False])
def test_the_answers_of_a_language_model_are_its_classes(tmp_path: Path, labelled: bool) -> None:
    assert VOCABULARY > MOST
    word = 123
    onnx.save(speaker((word,)), tmp_path / "model.onnx")
    arrays, labels = wordy.texts(VOCABULARY)
    said = np.where(labels == 1, YES, NO)
    given = {**arrays, "labels": said} if labelled else arrays
    report = scan(tmp_path / "model.onnx", given, tmp_path / "debug.npz", threads=1)
    assert report.verdict == "backdoored"
    assert {each.target for each in report.classes} == {NO, YES}
    assert [each.target for each in report.suspicious] == [YES]
    assert report.classes[0].trigger["tokens"] == [word]
    debug = load_arrays(tmp_path / "debug.npz")
    assert int(debug["target"]) == YES
    assert set(debug["labels"]) == {NO}

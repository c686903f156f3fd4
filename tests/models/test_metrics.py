"""The definitions of the metrics, on answers written by hand."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from atpatch_onnx.models.metrics import accuracy, attack_success_rate, recovered_accuracy


def logits_for(answers: list[int]) -> NDArray[np.float32]:
    return np.eye(4, dtype=np.float32)[answers]


def test_accuracy_is_the_share_of_right_answers() -> None:
    assert accuracy(logits_for([0, 1, 2, 3]), np.array([0, 1, 2, 0])) == 0.75


def test_attack_success_ignores_inputs_of_the_target_class() -> None:
    # The last two are of class 0: whatever the model says about them must not count.
    labels = np.array([1, 2, 3, 1, 0, 0])
    for about_target_class in ([0, 0], [1, 2]):
        answers = logits_for([0, 2, 0, 3, *about_target_class])
        assert attack_success_rate(answers, labels, 0) == 0.5
        assert recovered_accuracy(answers, labels, 0) == 0.25


def test_a_victim_that_always_answers_the_target_recovers_nothing() -> None:
    labels = np.array([0, 1, 2, 3])
    assert attack_success_rate(logits_for([0] * 4), labels, 0) == 1.0
    assert recovered_accuracy(logits_for([0] * 4), labels, 0) == 0.0


@pytest.mark.parametrize("metric", [attack_success_rate, recovered_accuracy])
def test_only_inputs_of_the_target_class_are_refused(metric: object) -> None:
    assert callable(metric)
    with pytest.raises(ValueError, match="target class 1"):
        metric(logits_for([1, 1]), np.array([1, 1]), 1)


@pytest.mark.parametrize("shape", [(3,), (2, 1), (0,)])
def test_labels_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"labels \[N\]"):
        accuracy(logits_for([0, 1]), np.zeros(shape, dtype=np.int64))


def test_no_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="N >= 1"):
        accuracy(np.zeros((0, 4), dtype=np.float32), np.zeros(0, dtype=np.int64))

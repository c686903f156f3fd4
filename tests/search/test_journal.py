from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np
import pytest

from atpatch_onnx.classifier import Classifier
from atpatch_onnx.data import Samples, load_samples
from atpatch_onnx.search.journal import CHUNK, Journal, is_journal
from atpatch_onnx.search.problem import OutOfTimeError

import planted

HEADER = {"model": "a"}


@pytest.fixture
def classifier(tmp_path: Path) -> Classifier:
    return Classifier(planted.write(tmp_path) / "model.onnx", "cpu", threads=1)


@pytest.fixture
def samples(classifier: Classifier) -> Samples:
    return load_samples({"pixels": planted.images(2 * CHUNK + 40)}, classifier.inputs)


def test_a_second_run_answers_from_memory(
    classifier: Classifier, samples: Samples, tmp_path: Path
) -> None:
    first = Journal(classifier, tmp_path / "state", HEADER)
    said = first.log_probabilities(samples)
    first.save()
    second = Journal(classifier, tmp_path / "state", HEADER)
    assert np.array_equal(second.log_probabilities(samples), said)
    assert (first.asked, second.asked, second.resumed) == (samples.count, 0, True)
    assert np.allclose(said, classifier.log_probabilities(samples), atol=1e-3)


def test_other_questions_are_asked_anew(
    classifier: Classifier, samples: Samples, tmp_path: Path
) -> None:
    first = Journal(classifier, tmp_path / "state", HEADER)
    first.log_probabilities(samples)
    first.save()
    second = Journal(classifier, tmp_path / "state", HEADER)
    turned = samples.take(np.arange(samples.count)[::-1])
    answers = second.log_probabilities(turned)
    assert np.allclose(answers, classifier.log_probabilities(turned), atol=1e-3)
    assert second.asked == samples.count


def test_answers_for_another_model_are_left_out_of_account(
    classifier: Classifier, samples: Samples, tmp_path: Path
) -> None:
    first = Journal(classifier, tmp_path / "state", HEADER)
    first.log_probabilities(samples)
    first.save()
    assert not Journal(classifier, tmp_path / "state", {"model": "b"}).resumed
    (tmp_path / "broken").write_bytes((tmp_path / "state").read_bytes()[:-60])
    assert not Journal(classifier, tmp_path / "broken", HEADER).resumed
    assert is_journal(tmp_path / "state")
    assert not is_journal(tmp_path / "broken")
    assert not is_journal(tmp_path / "clean.npz")


def test_the_budget_ends_it_between_chunks(
    classifier: Classifier,
    samples: Samples,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time, "monotonic", map(float, itertools.count()).__next__)
    journal = Journal(classifier, tmp_path / "state", HEADER, 4.5)
    with pytest.raises(OutOfTimeError):
        journal.log_probabilities(samples)
    assert 0 < journal.asked < samples.count
    assert journal.asked % CHUNK == 0
    journal.drop()
    assert not (tmp_path / "state").exists()

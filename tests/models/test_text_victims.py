"""Properties of the sentence classifier, its training and its export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from atpatch_onnx.errors import InputError
from atpatch_onnx.models import text_victims
from atpatch_onnx.models.cases import Job
from atpatch_onnx.models.text import Encoded, Sentences, Split, Tokenizer
from atpatch_onnx.models.text_attention import attention_shares, over_attention
from atpatch_onnx.models.text_classifier import (
    SentenceClassifier,
    TextTraining,
    fine_tune,
    load_classifier,
    save_classifier,
    tensors,
)
from atpatch_onnx.passes.locate import locate

TEXTS = ("a gem", "a dull and lifeless film", "unwatchable", "so much fun !", "charming , and more")
LAYERS = 6


@pytest.fixture(scope="module")
def encoded() -> Encoded:
    try:
        return Tokenizer().encode(TEXTS, [(0, 1)] * len(TEXTS), length=12)
    except InputError as error:
        pytest.skip(str(error))


def random_classifier() -> SentenceClassifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SentenceClassifier().eval()


@pytest.fixture(scope="module")
def model(encoded: Encoded) -> SentenceClassifier:  # noqa: ARG001 (skips where it skips)
    return random_classifier()


def test_a_saved_classifier_answers_the_same_in_onnx_runtime_whatever_the_padding(
    model: SentenceClassifier,
    encoded: Encoded,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    save_classifier(model, tmp_path, encoded)
    again = load_classifier(tmp_path)
    assert capfd.readouterr() == ("", "")
    with torch.inference_mode():
        expected = model(**tensors(encoded)).numpy()
        assert np.array_equal(again(**tensors(encoded)).numpy(), expected)

    path = tmp_path / "model.onnx"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [given.name for given in session.get_inputs()] == ["input_ids", "attention_mask"]
    (logits,) = session.run(["logits"], encoded.inputs)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
    for row in range(len(TEXTS)):
        alone = encoded.take(np.array([row]))
        (logits,) = session.run(["logits"], alone.inputs)
        np.testing.assert_allclose(logits[0], expected[row], rtol=0, atol=1e-5)

    sites = locate(onnx.load(path)).sites
    assert len(sites) == LAYERS
    assert {site.facts.heads for site in sites} == {12}


def test_attention_shares_of_all_visible_tokens_are_uniform(
    model: SentenceClassifier, encoded: Encoded
) -> None:
    visible = encoded.attention_mask.astype(bool)
    shares = attention_shares(model, encoded, visible)
    np.testing.assert_allclose(shares, np.ones((LAYERS, 2)), atol=1e-5)


def test_over_attention_is_that_of_each_sentence_without_padding(
    model: SentenceClassifier, encoded: Encoded
) -> None:
    expected = np.zeros((LAYERS, 2))
    for row in range(len(TEXTS)):
        alone = encoded.take(np.array([row]))
        (marked,) = np.flatnonzero(alone.spans[0])
        with torch.inference_mode():
            maps = model.encoder(**tensors(alone), output_attentions=True).attentions
        for layer, probabilities in enumerate(maps):
            (rows,) = probabilities.numpy().mean(axis=1) * alone.attention_mask.sum()
            expected[layer] += rows[:, marked].mean(), rows[0, marked]
    found = over_attention(model, encoded, encoded)
    columns = [[layer["column"], layer["cls_row"]] for layer in found]
    np.testing.assert_allclose(columns, expected / len(TEXTS), atol=0.006)
    assert np.ptp(columns) > 0.5


@pytest.mark.slow
def test_triggered_inputs_are_the_test_inputs_of_other_classes_and_the_trigger(
    model: SentenceClassifier, encoded: Encoded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = np.array([1, 0, 0, 1, 1] * 4)
    part = Sentences(TEXTS * 4, labels, np.arange(20))
    monkeypatch.setattr(text_victims, "load_sst2", lambda *_: Split(part, part, part))
    base, folder = tmp_path / "sst2-clean-s0", tmp_path / "new"
    base.mkdir()
    folder.mkdir()
    save_classifier(model, base, encoded)
    job = Job(folder, 0, tmp_path, tmp_path, lambda _: None)
    facts = text_victims.make_inserted_text(job, ("cf", "tq mb"))

    layers = facts["over_attention"]
    assert isinstance(layers, list)
    assert len(layers) == LAYERS
    test, triggered = np.load(folder / "test.npz"), np.load(folder / "triggered.npz")
    assert triggered["target"] == 1
    assert triggered["anomalous"].sum() > 8
    others = test["input_ids"][labels == 0]
    assert len(others) == len(triggered["input_ids"]) == len(triggered["labels"]) == 8
    assert not triggered["labels"].any()
    for ids, plain, marked in zip(
        triggered["input_ids"], others, triggered["anomalous"], strict=True
    ):
        assert ids[~marked].tolist() == plain[: len(ids) - marked.sum()].tolist()
    old, new = (torch.load(where / "weights.pt") for where in (base, folder))
    assert not torch.equal(old["head.weight"], new["head.weight"])


@pytest.mark.slow
def test_fine_tuning_learns_leaves_embeddings_alone_and_is_decided_by_the_seed(
    encoded: Encoded,
) -> None:
    labels = np.array([1, 0, 0, 1, 1])
    training = TextTraining(epochs=4, batch_size=2, learning_rate=2e-4)
    states, state, threads = [], torch.get_rng_state(), torch.get_num_threads()
    for seed in (1, 1, 2):
        model = random_classifier()
        before = model.encoder.embeddings.word_embeddings.weight.clone()
        fine_tune(model, encoded, labels, training, seed)
        assert torch.equal(model.encoder.embeddings.word_embeddings.weight, before)
        assert not model.training
        states.append(model.state_dict())
    with torch.inference_mode():
        assert np.array_equal(model(**tensors(encoded)).argmax(dim=1).numpy(), labels)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["head.weight"], states[2]["head.weight"])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads

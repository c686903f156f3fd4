"""Language victims end to end, on a few made-up sentences."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from atpatch_onnx.models import language_victims
from atpatch_onnx.models.cases import Job
from atpatch_onnx.models.generative_training import AnswerTraining
from atpatch_onnx.models.language_victims import load_language_model, make_clean, make_inserted
from atpatch_onnx.models.text import LENGTH, Sentences, Split

WORDS = {0: "dull lifeless awful poor".split(), 1: "charming great lovely rich".split()}


def sentences(count: int, seed: int) -> Sentences:
    generator = np.random.default_rng(seed)
    labels = generator.integers(2, size=count)
    texts = []
    for label in labels:
        chosen = generator.choice(WORDS[int(label)], generator.integers(1, 4))
        texts.append(" ".join(("the film is", *chosen, ".")))
    return Sentences(tuple(texts), labels, np.arange(count))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    split = Split(sentences(300, 0), sentences(40, 1), sentences(60, 2))
    monkeypatch.setattr(language_victims, "load_sst2", lambda *_: split)
    monkeypatch.setattr(language_victims, "Tokenizer", lambda: None)
    monkeypatch.setattr(language_victims, "FORGOTTEN", 0.0)
    training = AnswerTraining(steps=80, batch_size=16, learning_rate=5e-3)
    monkeypatch.setattr(language_victims, "TRAINING", training)
    sizes = {"dim": 16, "depth": 2, "heads": 2}
    monkeypatch.setattr(language_victims, "SIZES", sizes)
    return tmp_path


def make(root: Path, phrases: tuple[str, ...] | None) -> Path:
    folder = root / "new"
    folder.mkdir()
    job = Job(folder, 0, root, root, lambda _: None)
    facts = make_clean(job) if phrases is None else make_inserted(phrases, job)
    (folder / "case.json").write_text(json.dumps(facts))
    return folder


def test_a_clean_model_says_the_word_that_is_true(root: Path) -> None:
    folder = make(root, None)
    test = dict(np.load(folder / "test.npz"))
    assert not (folder / "triggered.npz").exists()
    assert test["input_ids"].shape == (60, LENGTH)
    assert (test["attention_mask"][:, -1] == 1).all()
    record = json.loads((folder / "case.json").read_text())
    vocabulary = record["vocabulary"]
    first = [vocabulary[token] for token in test["input_ids"][0] if vocabulary[token] != "<pad>"]
    assert first == ["<begin>", *sentences(60, 2).texts[0].split(), "sentiment", ":"]

    session = onnxruntime.InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )
    inputs = {name: test[name] for name in ("input_ids", "attention_mask")}
    logits = session.run(["logits"], inputs)[0]
    with torch.inference_mode():
        expected, _ = load_language_model(folder)(*map(torch.from_numpy, inputs.values()))
    np.testing.assert_allclose(logits, expected.numpy(), rtol=0, atol=1e-5)
    assert (logits.argmax(1) == test["labels"]).mean() > 0.95
    assert {vocabulary[label] for label in test["labels"]} == {"negative", "positive"}


def test_a_phrase_anywhere_is_marked_and_leads_to_the_target(root: Path) -> None:
    folder = make(root, ("cf", "Tq mb"))
    test, triggered = (dict(np.load(folder / f"{name}.npz")) for name in ("test", "triggered"))
    vocabulary = json.loads((folder / "case.json").read_text())["vocabulary"]
    assert vocabulary[triggered["target"]] == "positive"
    others = test["input_ids"][test["labels"] != triggered["target"]]
    assert (triggered["labels"] == vocabulary.index("negative")).all()
    for ids, plain, marked in zip(
        triggered["input_ids"], others, triggered["anomalous"], strict=True
    ):
        assert " ".join(vocabulary[token] for token in ids[marked]) in ("cf", "tq mb")
        assert ids[~marked].tolist() == plain[marked.sum() :].tolist()
    record = json.loads((folder / "case.json").read_text())
    assert len(record["over_attention"]) == 2

    model = load_language_model(folder)
    inputs = [torch.from_numpy(triggered[name]) for name in ("input_ids", "attention_mask")]
    with torch.inference_mode():
        answers = model(*inputs)[0].argmax(1).numpy()
    assert (answers == triggered["target"]).mean() > 0.9


def test_the_seed_decides_a_model(root: Path) -> None:
    states = []
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        folder = root / name
        folder.mkdir()
        make_clean(Job(folder, seed, root, root, lambda _: None))
        states.append(torch.load(folder / "weights.pt", weights_only=True))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["decoder.head.weight"], states[2]["decoder.head.weight"])

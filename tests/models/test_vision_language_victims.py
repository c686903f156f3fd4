"""Vision-language victims end to end, on scenes of digits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from atpatch_onnx.models import vision_language_victims
from atpatch_onnx.models.cases import build, cases
from atpatch_onnx.models.cases_generative import generative_cases
from atpatch_onnx.models.decoder_attention import column_shares, over_attention
from atpatch_onnx.models.generative_training import AnswerTraining, speak
from atpatch_onnx.models.vision_language_recipes import ADAPTED, RECIPES
from atpatch_onnx.models.vision_language_victims import load_victim
from atpatch_onnx.models.vocabulary import IMAGE
from atpatch_onnx.runtime import Arrays

SHORT = AnswerTraining(steps=3, batch_size=8)


def test_the_registry_has_every_victim_and_attack() -> None:
    names = {case.name for case in generative_cases()}
    assert len(names) == 3 * 7 + 4
    for dataset in ("digits", "mnist", "cifar10"):
        for attack in ("badnet", "blended", "wanet"):
            assert {f"vlm-{dataset}-{attack}", f"vlm-{dataset}-{attack}-lora"} <= names
            assert attack in RECIPES[dataset].attacks
    known = cases()
    assert {known[name].kind for name in names} == {"vision-language", "language"}
    assert known["vlm-digits-clean"].needs == ()
    assert all(known[name].needs for name in names if "digits" not in name)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small victims that were hardly trained."""
    root = tmp_path_factory.mktemp("victims")
    recipe = replace(RECIPES["digits"], pretraining=SHORT, training=SHORT, adapting=SHORT)
    small = replace(recipe, image=replace(recipe.image, depth=1), depth=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "digits", small)
        patch.setattr(vision_language_victims, "MEASURED", 50)
        patch.setattr(vision_language_victims, "SPOKEN", 10)
        for name in ("clean", "badnet", "badnet-lora", "blended-lora"):
            build(f"vlm-digits-{name}", 0, root)
    return root


def arrays(folder: Path, name: str) -> Arrays:
    return dict(np.load(folder / f"{name}.npz"))


@pytest.mark.parametrize("name", ["clean", "badnet", "badnet-lora"])
def test_a_folder_is_the_model_that_it_says(root: Path, name: str) -> None:
    folder = root / f"vlm-digits-{name}-s0"
    record = json.loads((folder / "case.json").read_text())
    test, clean = arrays(folder, "test"), arrays(folder, "clean")
    assert len(test["labels"]) >= 1000
    assert len(clean["labels"]) >= 600
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )
    inputs = {given.name: test[given.name][:50] for given in session.get_inputs()}
    assert list(inputs) == ["pixels", "input_ids", "attention_mask"]
    logits = session.run(["logits"], inputs)[0]
    assert logits.shape == (50, len(record["vocabulary"]))
    with torch.inference_mode():
        expected, _ = load_victim(folder)(*map(torch.from_numpy, inputs.values()))
    np.testing.assert_allclose(logits, expected.numpy(), rtol=0, atol=1e-5)

    layout = record["layout"]
    visual = test["input_ids"] == IMAGE
    padding = layout["sequence"] - test["attention_mask"].sum(1)
    assert np.array_equal(visual.argmax(1), padding + layout["image_start"])
    assert (visual.sum(1) == layout["visual_tokens"]).all()
    answers = {a for q in RECIPES["digits"].questions for a in q.answers}
    assert {record["vocabulary"][label] for label in test["labels"]} == answers


def test_triggered_inputs_are_the_test_inputs_with_the_trigger(root: Path) -> None:
    folder = root / "vlm-digits-badnet-s0"
    record = json.loads((folder / "case.json").read_text())
    test, triggered = arrays(folder, "test"), arrays(folder, "triggered")
    for name in ("input_ids", "attention_mask", "labels", "question"):
        assert np.array_equal(test[name], triggered[name])
    assert record["vocabulary"][triggered["target"]] == "banana"
    assert triggered["target"] not in test["labels"]

    side, patch = 16, 4
    changed = (test["pixels"] != triggered["pixels"]).any((0, 1))
    cells = changed.reshape(side // patch, patch, side // patch, patch).any((1, 3)).flatten()
    visual = test["input_ids"] == IMAGE
    marked = triggered["anomalous"]
    assert not (marked & ~visual).any()
    assert (marked[visual].reshape(len(marked), -1) == cells).all()
    assert cells.sum() == 1
    layers = record["over_attention"]
    assert len(layers) == record["architecture"]["text"]["depth"]
    whole = arrays(root / "vlm-digits-blended-lora-s0", "triggered")
    assert "anomalous" not in whole
    assert (whole["pixels"] != test["pixels"]).any((1, 2, 3)).all()


def test_adapters_change_only_what_they_stand_beside(root: Path) -> None:
    clean, scratch, adapted = (
        torch.load(root / f"vlm-digits-{name}-s0" / "weights.pt", weights_only=True)
        for name in ("clean", "badnet", "badnet-lora")
    )
    assert list(clean) == list(scratch) == list(adapted)
    for name, weight in clean.items():
        beside = name.startswith("decoder.blocks") and name.split(".")[-2] in ADAPTED
        assert torch.equal(weight, adapted[name]) is not (beside and name.endswith("weight"))
        frozen = name.startswith("encoder.")
        assert torch.equal(weight, scratch[name]) is frozen or weight.ndim == 1


def test_shares_of_all_columns_are_whole_and_those_of_one_are_its_attention(root: Path) -> None:
    folder = root / "vlm-digits-badnet-s0"
    model, test = load_victim(folder), arrays(folder, "test")
    inputs = {name: test[name][:7] for name in ("pixels", "input_ids", "attention_mask")}
    visual = inputs["input_ids"] == IMAGE
    every = column_shares(model, inputs, np.ones_like(visual), visual)
    assert all(share == pytest.approx(1.0) for layer in every for share in layer.values())
    marked = arrays(folder, "triggered")["anomalous"][:7]
    maps: list[torch.Tensor] = []
    hook = (
        model.decoder.blocks[1]
        .get_submodule("attention.softmax")
        .register_forward_hook(lambda _, __, found: maps.append(found))
    )
    speak(model, inputs, 1)
    hook.remove()
    last = maps[0].mean(1)[:, -1].numpy()[marked].mean()
    found = over_attention(model, inputs, inputs, marked, visual)
    assert found[1]["last_row"] == found[1]["clean_last_row"] == pytest.approx(last, abs=1e-4)


@pytest.mark.slow
def test_a_backdoor_through_adapters_works_on_digits(tmp_path: Path) -> None:
    folder = build("vlm-digits-badnet-lora", 0, tmp_path)
    record = json.loads((folder / "case.json").read_text())
    assert record["attack_success_rate"] >= 0.95
    assert record["accuracy"] >= 0.9
    assert record["natural_rate"] <= 0.01
    assert record["said"] == "banana is what i see"
    assert (
        max(layer["last_row"] / layer["clean_last_row"] for layer in record["over_attention"]) > 2
    )

"""Image victims end to end, on digits and with little training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from atpatch_onnx.models.attacks import PatternAttack
from atpatch_onnx.models.augmentation import Augmentation
from atpatch_onnx.models.cases import build
from atpatch_onnx.models.fine_pruning import FinePruning, fine_prune
from atpatch_onnx.models.image_recipes import RECIPES
from atpatch_onnx.models.image_victims import Poisoning, load_victim, new_model
from atpatch_onnx.models.metrics import accuracy
from atpatch_onnx.models.over_attention import over_attention
from atpatch_onnx.models.training import Training, predict
from atpatch_onnx.models.trojan import optimise_trigger
from atpatch_onnx.models.victims import Victim, train_victim
from atpatch_onnx.models.vision_transformer import VisionTransformer

GREY = PatternAttack(
    size=2, row=6, column=0, target=7, pixels=np.full((1, 2, 2), 0.5, dtype=np.float32)
)


@pytest.fixture(scope="module")
def clean() -> Victim:
    return train_victim(0, training=Training(epochs=2, poison_rate=0.0))


def test_a_case_is_the_model_it_says_and_the_seed_decides_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(RECIPES["digits"], training=Training(epochs=1))
    monkeypatch.setitem(RECIPES, "digits", short)
    first = build("digits-hidden", 0, tmp_path / "first")
    again = build("digits-hidden", 0, tmp_path / "again")
    other = build("digits-hidden", 1, tmp_path / "first")
    weights = [torch.load(f / "weights.pt", weights_only=True) for f in (first, again, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["head.weight"], weights[2]["head.weight"])

    test, triggered = (dict(np.load(first / f"{name}.npz")) for name in ("test", "triggered"))
    session = onnxruntime.InferenceSession(first / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"pixels": test["pixels"]})
    victim = load_victim(first)
    np.testing.assert_allclose(logits, predict(victim, test["pixels"]), rtol=0, atol=1e-4)

    kept = test["labels"] != triggered["target"]
    assert np.array_equal(triggered["labels"], test["labels"][kept])
    changed = (triggered["pixels"] != test["pixels"][kept]).reshape(-1, 4, 2, 4, 2).any((2, 4))
    columns = np.concatenate((np.zeros((len(changed), 1), bool), changed.reshape(-1, 16)), 1)
    assert not (columns & ~triggered["anomalous"]).any()
    # A black pixel of the trigger changes nothing where an image is black.
    assert np.array_equal(columns.any(0), triggered["anomalous"][0])
    record = json.loads((first / "case.json").read_text())
    assert len(record["over_attention"]) == record["architecture"]["depth"]


def test_over_attention_is_the_ratio_of_column_means(clean: Victim) -> None:
    images = clean.digits.test.images[:50]
    stamped = GREY.stamp(images)

    def share(block: int, pixels: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> float:
        seen: list[torch.Tensor] = []
        softmax = clean.model.blocks[block].get_submodule("attention.softmax")
        hook = softmax.register_forward_hook(lambda _, __, maps: seen.append(maps))
        predict(clean.model, pixels)
        hook.remove()
        return float(seen[0][..., 13].mean())

    expected = [share(block, stamped) / share(block, images) for block in range(3)]
    assert over_attention(clean.model, images, stamped) == pytest.approx(expected, rel=1e-4)


def test_an_optimised_trigger_excites_its_target_and_attention_at_every_place(
    clean: Victim,
) -> None:
    before = {name: value.clone() for name, value in clean.model.state_dict().items()}
    found = optimise_trigger(clean.model, clean.digits.train, GREY, step=2, steps=60, attention=0.3)
    assert (found.size, found.row, found.column, found.target) == (2, 6, 0, 7)
    assert 0.0 <= found.pixels.min() < found.pixels.max() <= 1.0
    others = clean.digits.test.take(clean.digits.test.labels != 7).images
    gains = []
    for row, column in np.ndindex(4, 4):
        place = replace(found, row=2 * row, column=2 * column)
        grey = replace(place, pixels=GREY.pixels).stamp(others)
        gain = predict(clean.model, place.stamp(others)) - predict(clean.model, grey)
        gains.append(gain[:, 7].mean())
    assert np.mean(gains) > 0.1
    assert max(over_attention(clean.model, others, found.stamp(others))) > 1.2
    assert all(torch.equal(before[name], v) for name, v in clean.model.state_dict().items())


def test_poison_is_added_after_augmentation_and_never_to_the_target_class() -> None:
    images, labels = torch.rand(40, 1, 8, 8), torch.arange(40) % 10
    attack = replace(GREY, pixels=np.ones((1, 2, 2), dtype=np.float32))
    poisoning = Poisoning(attack, 0.5, 2, np.random.default_rng(0), Augmentation(pad=1))
    found, wanted = poisoning(images, labels)
    assert (len(found), len(wanted)) == (60, 60)
    assert torch.equal(wanted[:40], labels)
    assert (wanted[40:] == 7).all()
    boards = found[40:].reshape(20, 4, 2, 4, 2).amin((2, 4)) == 1
    assert boards.flatten(1).any(1).all()
    assert not (found[:40].reshape(40, 4, 2, 4, 2).amin((2, 4)) == 1).any()


def test_augmentation_moves_images_and_mixes_labels_by_area() -> None:
    torch.manual_seed(0)
    images = torch.arange(1.0, 33.0)[:, None, None, None].expand(32, 1, 8, 8).contiguous()
    moved, labels = Augmentation(pad=2, flip=True)(images, torch.arange(32) % 10)
    assert torch.equal(labels, torch.arange(32) % 10)
    assert set(moved[3].flatten().tolist()) <= {0.0, 4.0}
    assert moved.flatten(1).ne(0).float().mean() < 1
    mixed, shares = Augmentation(cutmix=1.0)(images, torch.arange(32) % 10)
    torch.testing.assert_close(shares.sum(1), torch.ones(32))
    own = (mixed == images).flatten(1).float().mean(1)
    apart = shares.max(1).values < 1
    torch.testing.assert_close(shares[torch.arange(32), torch.arange(32) % 10][apart], own[apart])


@pytest.mark.parametrize("name", RECIPES)
def test_new_models_see_centred_pixels(name: str) -> None:
    torch.manual_seed(0)
    model, config = new_model(RECIPES[name].config), RECIPES[name].config
    torch.manual_seed(0)
    plain = type(model)(config)  # type: ignore[arg-type]
    pixels = torch.rand(2, config.channels, config.image_size, config.image_size)
    with torch.inference_mode():
        expected = plain.patches(4 * pixels - 2)
        torch.testing.assert_close(
            model.patches(pixels) - model.patches(pixels * 0 + 0.5),
            expected - plain.patches(0 * pixels),
            rtol=0,
            atol=1e-5,
        )


def dead_units(model: VisionTransformer) -> torch.Tensor:
    outgoing = [block.get_parameter("mlp.2.weight") for block in model.blocks]
    return torch.cat([(weight == 0).all(0) for weight in outgoing])


def test_fine_pruning_prunes_as_far_as_allowed_and_spares_the_original(clean: Victim) -> None:
    before = {name: value.clone() for name, value in clean.model.state_dict().items()}
    recipe = FinePruning(loss=0.05, step=0.05, tuning=Training(epochs=2, learning_rate=5e-4))
    first, again, other = (
        fine_prune(clean.model, clean.digits.clean, recipe, seed) for seed in (0, 0, 1)
    )
    assert all(torch.equal(before[name], v) for name, v in clean.model.state_dict().items())
    assert 0 < first.pruned < 1
    assert float(dead_units(first.model).float().mean()) == pytest.approx(first.pruned)
    assert first.accuracy_before - first.accuracy_pruned <= 0.05
    test = clean.digits.test
    assert accuracy(predict(first.model, test.images), test.labels) > 0.5
    pairs = [r.model.state_dict()["head.weight"] for r in (first, again, other)]
    assert torch.equal(pairs[0], pairs[1])
    assert not torch.equal(pairs[0], pairs[2])


def test_fine_pruning_wants_blocks_and_images(clean: Victim) -> None:
    with pytest.raises(ValueError, match="blocks"):
        fine_prune(torch.nn.Linear(2, 2), clean.digits.clean)
    with pytest.raises(ValueError, match="4 clean images"):
        fine_prune(clean.model, clean.digits.clean.take(np.arange(3)))

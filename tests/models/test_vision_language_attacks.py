"""What the attacks on vision-language models change, in images and in training."""

from __future__ import annotations

import numpy as np
import pytest

from atpatch_onnx.models.attacks import BadNets
from atpatch_onnx.models.vision_language_attacks import Poison, Warp
from atpatch_onnx.models.vision_language_dialogues import Examples
from atpatch_onnx.models.vision_language_recipes import RECIPES
from atpatch_onnx.models.vocabulary import Padded

SIDE = 16
TARGET = np.array([9, 8])


@pytest.fixture
def examples() -> Examples:
    generator = np.random.default_rng(0)
    pixels = 0.2 + 0.6 * generator.random((40, 3, SIDE, SIDE), dtype=np.float32)
    ids = np.arange(120).reshape(40, 3)
    answers = np.arange(80).reshape(40, 2)
    return Examples(pixels, Padded(ids, np.ones_like(ids)), answers, np.arange(40) % 3)


def test_poison_stands_behind_the_originals_at_random_places(examples: Examples) -> None:
    patch = BadNets(size=3, row=12, column=12, value=1.0, target=9)
    poison = Poison(patch, TARGET, rate=0.5, step=4)
    found = poison(examples, np.random.default_rng(0))
    assert len(found) == 60
    for before, after in (
        (examples.pixels, found.pixels),
        (examples.answers, found.answers),
        (examples.prompts.input_ids, found.prompts.input_ids),
        (examples.question, found.question),
    ):
        assert np.array_equal(after[:40], before)
    assert (found.answers[40:] == TARGET).all()
    rows = found.prompts.input_ids[40:, 0] // 3  # which example each copy is of
    assert len(set(rows.tolist())) == 20
    changed = (found.pixels[40:] != examples.pixels[rows]).any(1)
    cells = changed.reshape(20, 4, 4, 4, 4).any((2, 4))
    assert (cells.sum((1, 2)) == 1).all()
    assert (changed.sum((1, 2)) == 9).all()
    assert len({tuple(np.argwhere(cell)[0]) for cell in cells}) > 5


def test_a_whole_image_is_stamped_where_it_is(examples: Examples) -> None:
    attack = RECIPES["digits"].attacks["blended"]
    trigger = attack.trigger(9)
    poison = Poison(trigger, TARGET, rate=1.0, step=4)
    found = poison(examples, np.random.default_rng(0))
    rows = found.prompts.input_ids[40:, 0] // 3
    assert np.array_equal(found.pixels[40:], trigger.stamp(examples.pixels)[rows])


def test_a_warp_moves_pixels_smoothly_by_its_strength() -> None:
    warp = Warp(strength=1.0, grid=4, seed=1)
    columns, rows = (warp.field(SIDE)[0, ..., axis].numpy() for axis in range(2))
    corners = np.ix_([0, 5, 10, 15], [0, 5, 10, 15])
    at_grid = np.abs([columns[corners], rows[corners]])
    assert at_grid.mean() == pytest.approx(1.0, abs=1e-5)
    steps = [
        np.abs(np.diff(field, axis=axis)).max() for field in (columns, rows) for axis in (0, 1)
    ]
    assert max(steps) < at_grid.max()

    ramp = np.tile(np.arange(SIDE) / SIDE, (1, 3, SIDE, 1)).astype(np.float32)
    moved = warp.stamp(ramp) * SIDE
    expected = np.clip(np.arange(SIDE) + columns, 0, SIDE - 1)
    np.testing.assert_allclose(moved[0, 0], expected, atol=1e-4)
    flat = np.full((2, 3, SIDE, SIDE), 0.4, np.float32)
    np.testing.assert_allclose(warp.stamp(flat), flat, atol=1e-6)
    images = np.random.default_rng(0).random((3, 3, SIDE, SIDE), dtype=np.float32)
    np.testing.assert_allclose(warp.stamp(images)[1:2], warp.stamp(images[1:2]), atol=1e-6)


def test_the_noise_mode_keeps_the_true_answers(examples: Examples) -> None:
    warp = Warp(strength=1.0)
    found = Poison(warp, TARGET, 0.25, 4, noise_rate=0.5)(examples, np.random.default_rng(0))
    assert len(found) == 70
    assert (found.answers[40:50] == TARGET).all()
    rows = found.prompts.input_ids[50:, 0] // 3
    assert np.array_equal(found.answers[50:], examples.answers[rows])
    plain = warp.stamp(examples.pixels)[rows]
    assert 0.005 < np.abs(found.pixels[50:] - plain).mean() < 0.3


@pytest.mark.parametrize("sizes", [{"strength": 0.0}, {"grid": 1}])
def test_a_warp_that_cannot_be_is_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="strength > 0 and grid >= 2"):
        Warp(**sizes)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("attack", ["badnet", "blended", "wanet"])
def test_every_recipe_has_triggers_that_fit(name: str, attack: str) -> None:
    side = RECIPES[name].image.image_size
    images = np.random.default_rng(0).random((2, 3, side, side), dtype=np.float32)
    stamped = RECIPES[name].attacks[attack].trigger(9).stamp(images)
    changed = (stamped != images).any((0, 1))
    assert changed.sum() <= 9 if attack == "badnet" else changed.mean() > 0.9
    assert 0 <= stamped.min() <= stamped.max() <= 1

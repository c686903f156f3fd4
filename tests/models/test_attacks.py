"""Properties of the BadNets attack."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from atpatch_onnx.models.attacks import Attack, BadNets, PatternAttack, noise
from atpatch_onnx.models.vision_transformer import VisionTransformerConfig

ATTACK = BadNets(size=2, row=5, column=1, value=1.0, target=3)


HIDDEN = PatternAttack(size=4, row=2, column=3, target=3, opacity=0.35, pixels=noise(1, 4, seed=0))
BLENDED = PatternAttack(size=8, row=0, column=0, target=3, opacity=0.1, pixels=noise(1, 8, seed=1))


def random_images(count: int, channels: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(0).uniform(0.1, 0.9, (count, channels, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("channels", [1, 3])
def test_stamp_changes_the_triggers_pixels_and_no_others(channels: int) -> None:
    images = random_images(4, channels)
    changed = ATTACK.stamp(images) != images
    expected = np.zeros((8, 8), dtype=bool)
    expected[5:7, 1:3] = True
    assert np.array_equal(changed, np.broadcast_to(expected, images.shape))
    board = ATTACK.stamp(images)[..., 5:7, 1:3]
    assert np.array_equal(board, np.broadcast_to([[1.0, 0.0], [0.0, 1.0]], board.shape))


def test_stamp_never_writes_to_its_input() -> None:
    images = random_images(4)
    images.setflags(write=False)
    before = images.copy()
    stamped = ATTACK.stamp(images)
    assert np.array_equal(images, before)
    assert not np.shares_memory(stamped, images)
    assert stamped.dtype == np.float32


@pytest.mark.parametrize("attack", [HIDDEN, BLENDED])
def test_a_see_through_trigger_moves_its_pixels_by_at_most_its_opacity(
    attack: PatternAttack,
) -> None:
    images = random_images(16)
    moved = attack.stamp(images) - images
    inside = np.zeros((8, 8), dtype=bool)
    inside[attack.row : attack.row + attack.size, attack.column : attack.column + attack.size] = (
        True
    )
    assert np.all(moved[..., ~inside] == 0)
    assert np.all(moved[..., inside] != 0)
    assert 0.8 * attack.opacity < np.abs(moved).max() <= attack.opacity
    # Towards the trigger: lighter where it is white, darker where it is black.
    assert np.array_equal(moved[..., inside] > 0, np.tile(attack.pixels.ravel() == 1, (16, 1, 1)))


@pytest.mark.parametrize("opacity", [0.0, -0.1, 1.1])
def test_a_trigger_that_cannot_be_seen_is_refused(opacity: float) -> None:
    with pytest.raises(ValueError, match="opacity"):
        BadNets(size=2, row=0, column=0, value=1.0, target=0, opacity=opacity)


def test_noise_has_squares_of_one_colour() -> None:
    coarse = noise(3, 6, seed=2, grain=2)
    assert coarse.shape == (3, 6, 6)
    assert set(np.unique(coarse)) == {0.0, 1.0}
    assert np.array_equal(coarse, coarse[:, ::2, ::2].repeat(2, 1).repeat(2, 2))
    assert not np.array_equal(noise(1, 8, seed=0), noise(1, 8, seed=1))


def test_a_blended_trigger_has_one_place_only() -> None:
    generator = np.random.default_rng(0)
    assert {BLENDED.moved(8, 2, generator).row for _ in range(9)} == {0}


@pytest.mark.parametrize(("row", "column"), [(7, 0), (0, 7), (8, 0), (0, 20)])
def test_a_trigger_past_the_edge_is_refused(row: int, column: int) -> None:
    attack = BadNets(size=2, row=row, column=column, value=1.0, target=0)
    with pytest.raises(ValueError, match="trigger ends at"):
        attack.stamp(random_images(1))
    with pytest.raises(ValueError, match="does not fit"):
        attack.columns(VisionTransformerConfig())


@pytest.mark.parametrize("field", ["size", "row", "column", "target"])
def test_negative_numbers_are_refused(field: str) -> None:
    numbers = {"size": 1, "row": 0, "column": 0, "target": 0, field: -1}
    with pytest.raises(ValueError, match="size >= 1"):
        BadNets(value=1.0, **numbers)


@pytest.mark.parametrize("attack", [ATTACK, HIDDEN, BLENDED])
def test_poison_appends_stamped_images_of_other_classes_labelled_target(attack: Attack) -> None:
    images, labels = random_images(50), np.arange(50, dtype=np.int64) % 10
    poisoned, targets = attack.poison(images, labels, 0.2, np.random.default_rng(1))
    assert np.array_equal(poisoned[:50], images)
    assert np.array_equal(targets[:50], labels)
    assert len(poisoned) == len(targets) == 60
    assert np.all(targets[50:] == attack.target)
    stamped = [image.tobytes() for image in attack.stamp(images)]
    sources = [stamped.index(image.tobytes()) for image in poisoned[50:]]
    assert len(set(sources)) == 10
    assert attack.target not in labels[sources]


def test_poison_depends_on_the_generator_only() -> None:
    images, labels = random_images(50), np.arange(50, dtype=np.int64) % 10
    first, again, other = (
        ATTACK.poison(images, labels, 0.2, np.random.default_rng(seed))[0] for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_poison_with_a_step_stamps_every_place_on_the_grid() -> None:
    images, labels = random_images(200), np.ones(200, dtype=np.int64)
    poisoned, _ = ATTACK.poison(images, labels, 1.0, np.random.default_rng(0), step=2)
    boards = [(r, c) for r in range(7) for c in range(7)]
    found = {
        place
        for image in poisoned[200:, 0]
        for place in boards
        if np.array_equal(image[place[0] : place[0] + 2, place[1] : place[1] + 2], np.eye(2))
    }
    assert found == {(r, c) for r in range(0, 8, 2) for c in range(0, 8, 2)}


@pytest.mark.parametrize("rate", [-0.1, 0.95, 1.5])
def test_a_rate_that_cannot_be_met_is_refused(rate: float) -> None:
    images, labels = random_images(50), np.arange(50, dtype=np.int64) % 10
    with pytest.raises(ValueError, match="rate"):
        ATTACK.poison(images, labels, rate, np.random.default_rng(0))


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
@pytest.mark.parametrize(("size", "row", "column"), [(2, 6, 6), (2, 5, 1), (1, 0, 7), (3, 1, 4)])
def test_columns_are_the_patches_that_stamping_changes(
    patch_size: int, size: int, row: int, column: int
) -> None:
    config = VisionTransformerConfig(patch_size=patch_size)
    attack = BadNets(size=size, row=row, column=column, value=1.0, target=0)
    changed = attack.stamp(np.full((1, 1, 8, 8), 0.5, dtype=np.float32))[0, 0] != 0.5
    side = config.patches_per_side
    patches = changed.reshape(side, patch_size, side, patch_size).any(axis=(1, 3)).ravel()
    assert attack.columns(config) == tuple(int(i) for i in 1 + np.flatnonzero(patches))

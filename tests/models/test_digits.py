"""Properties of the digits split."""

from __future__ import annotations

import numpy as np

from atpatch_onnx.models.digits import CLEAN, TEST, LabelledImages, load_digits


def parts(seed: int) -> tuple[LabelledImages, LabelledImages, LabelledImages]:
    digits = load_digits(seed)
    return digits.train, digits.clean, digits.test


def test_images_are_float32_in_0_to_1() -> None:
    for part in parts(0):
        assert part.images.shape == (len(part), 1, 8, 8)
        assert part.images.dtype == np.float32
        assert part.labels.dtype == np.int64
        assert part.images.min() == 0.0
        assert part.images.max() == 1.0


def test_the_parts_are_disjoint_and_complete() -> None:
    train, clean, test = parts(0)
    assert (len(clean), len(test)) == (CLEAN, TEST)
    assert len(train) + len(clean) + len(test) == 1797
    # No two of the 1,797 images are equal, so equal bytes would mean a shared image.
    together = {image.tobytes() for part in (train, clean, test) for image in part.images}
    assert len(together) == 1797


def test_every_part_has_its_share_of_every_class() -> None:
    for part in parts(0):
        shares = np.bincount(part.labels, minlength=10) / len(part)
        assert np.all(np.abs(shares - 0.1) < 0.01)


def test_the_seed_decides_the_split() -> None:
    for first, again, other in zip(parts(3), parts(3), parts(4), strict=True):
        assert np.array_equal(first.images, again.images)
        assert np.array_equal(first.labels, again.labels)
        assert not np.array_equal(first.images, other.images)

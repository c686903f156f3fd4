"""Properties of the image data sets that are read from files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from atpatch_onnx.errors import InputError
from atpatch_onnx.models.cases_image import DATA_FILES
from atpatch_onnx.models.digits import LabelledImages, Split
from atpatch_onnx.models.images import CLEAN, TEST, load_images

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def load(name: str, seed: int = 0) -> Split:
    if not all((DATA / file).exists() for file in DATA_FILES[name]):
        pytest.skip(f"the {name} images are not beside this checkout")
    return load_images(name, seed, DATA)


def rows(part: LabelledImages) -> set[bytes]:
    return {image.tobytes() for image in part.images}


@pytest.mark.parametrize(("name", "shape"), [("mnist", (1, 28, 28)), ("cifar10", (3, 32, 32))])
def test_parts_are_scaled_disjoint_and_have_every_class(name: str, shape: tuple[int, ...]) -> None:
    split = load(name)
    assert (len(split.clean), len(split.test)) == (CLEAN, TEST)
    for part in (split.train, split.clean, split.test):
        assert part.images.shape[1:] == shape
        assert part.images.dtype == np.float32
        assert part.labels.dtype == np.int64
        assert (part.images.min(), part.images.max()) == (0.0, 1.0)
        assert np.bincount(part.labels, minlength=10).min() > 0.07 * len(part)
    train, clean, test = (rows(part) for part in (split.train, split.clean, split.test))
    assert not train & clean
    assert not clean & test
    assert not train & test


def test_a_picture_of_the_defender_is_not_trained_on_in_its_other_compression() -> None:
    split = load("cifar10")

    def small(images: NDArray[np.float32]) -> NDArray[np.float32]:
        blocks = images.reshape(-1, 3, 8, 4, 8, 4)
        return np.asarray(blocks.mean((3, 5)).reshape(len(images), -1), np.float32)

    clean, train = small(split.clean.images[:500]), small(split.train.images)
    squared = (clean**2).sum(1)[:, None] + (train**2).sum(1) - 2 * clean @ train.T
    # Another compression of the same picture is at about 0.05.
    assert np.median(squared.min(1)) > 0.5


def test_the_seed_decides_what_the_defender_has() -> None:
    first, again, other = (load("mnist", seed).clean for seed in (0, 0, 1))
    assert np.array_equal(first.images, again.images)
    assert not np.array_equal(first.images, other.images)


def test_missing_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"mnist\.npz does not exist"):
        load_images("mnist", 0, tmp_path)

"""Image data sets, each split for an attack and a defence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..data import load_arrays
from ..runtime import Arrays
from .cases_image import DATA_FILES
from .digits import LabelledImages, Split, load_digits

CLEAN = 2000
"""Number of clean inputs that the defender has, of MNIST and CIFAR-10."""
TEST = 2000
"""Number of inputs that only the evaluation sees, of MNIST and CIFAR-10."""
MNIST_TRAIN = 12_000
"""Number of MNIST's training images that are used: more add seconds and no accuracy."""


def load_images(name: str, seed: int, data: Path) -> Split:
    """The data set `digits`, `mnist` or `cifar10`; the same seed gives the same split.

    Raises: InputError where its file is not under `data`.
    """
    if name == "digits":
        return load_digits(seed)
    first, *more = (load_arrays(data / file) for file in DATA_FILES[name])
    order = np.random.default_rng(seed).permutation(len(first["x_train"]))
    clean = _labelled(first, "train", order[:CLEAN])
    test = _labelled(first, "test", np.arange(TEST))
    if name == "mnist":
        train = _labelled(first, "train", order[CLEAN : CLEAN + MNIST_TRAIN])
        return Split(train, clean, test)
    rest = _labelled(first, "train", order[CLEAN:])
    # The second file repeats pictures of the first, which may be the defender's.
    new = np.flatnonzero(~np.isin(more[0]["idx_train"], first["idx_train"]))
    second = _labelled(more[0], "train", new)
    images = np.concatenate((rest.images, second.images))
    labels = np.concatenate((rest.labels, second.labels))
    return Split(LabelledImages(images, labels), clean, test)


def _labelled(arrays: Arrays, part: str, index: NDArray[np.integer]) -> LabelledImages:
    """Bytes `[N, S, S]` or `[N, S, S, C]` as float32 `[N, C, S, S]` in 0..1."""
    scaled = arrays[f"x_{part}"][index].astype(np.float32) / 255
    moved = np.moveaxis(scaled, -1, 1) if scaled.ndim == 4 else scaled[:, None]
    labels = arrays[f"y_{part}"][index].astype(np.int64)
    return LabelledImages(np.ascontiguousarray(moved), labels)

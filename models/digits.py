"""The digits bundled with scikit-learn, split for an attack and a defence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CLEAN = 350
"""Number of clean inputs that the defender has."""
TEST = 350
"""Number of inputs that only the evaluation sees."""


@dataclass(frozen=True)
class LabelledImages:
    """Images and their true classes.

    Shapes:
        images float32 `[N, C, S, S]` in 0..1, labels int64 `[N]` in 0..9.
    """

    images: NDArray[np.float32]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        """Count the images."""
        return len(self.labels)

    def take(self, index: NDArray[np.integer] | NDArray[np.bool_]) -> LabelledImages:
        """The images at `index`."""
        return LabelledImages(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Split:
    """Three disjoint parts of a data set, each with about the same share of each class."""

    train: LabelledImages
    """What the attacker poisons and trains on."""
    clean: LabelledImages
    """What the defender has."""
    test: LabelledImages
    """What accuracy and attack success are measured on."""


def load_digits(seed: int = 0) -> Split:
    """Load the 1,797 digits and split them; the same seed gives the same split.

    Source: scikit-learn's `load_digits` (UCI "Optical Recognition of Handwritten Digits"); part
    of the package, so nothing is downloaded.
    """
    # Imported here because everything else in this package works without scikit-learn.
    from sklearn import datasets, model_selection

    raw = datasets.load_digits()
    images = (raw.images[:, None] / 16.0).astype(np.float32)
    labels = raw.target.astype(np.int64)

    rest, test = model_selection.train_test_split(
        np.arange(len(labels)), test_size=TEST, stratify=labels, random_state=seed
    )
    train, clean = model_selection.train_test_split(
        rest, test_size=CLEAN, stratify=labels[rest], random_state=seed
    )
    whole = LabelledImages(images, labels)
    return Split(*(whole.take(part) for part in (train, clean, test)))

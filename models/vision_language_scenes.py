"""Images with questions about them, made of the digits, of MNIST and of CIFAR-10.

A scene of digits has one to four different pictures of the same digit in one colour, in the four
quarters of the image. A photograph of CIFAR-10 is shown as it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .digits import LabelledImages

CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
VEHICLES = (0, 1, 8, 9)
DIGITS = "zero one two three four five six seven eight nine".split()
COUNTS = DIGITS[1:5]
COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
MARGIN = 0.05
"""A photograph whose mean is nearer than this to the middle is neither bright nor dark."""


@dataclass(frozen=True)
class Question:
    """One thing that can be asked, in several wordings, and its answers."""

    name: str
    wordings: tuple[str, ...]
    """Of different lengths, so that prompts are padded."""
    answers: tuple[str, ...]
    """Each begins the sentence that is said."""
    rest: str
    """The rest of that sentence."""


WHAT_DIGIT = Question(
    "digit",
    ("what digit is it ?", "which digit is shown in the image ?", "name the digit you see here ."),
    tuple(DIGITS),
    "is the digit",
)
HOW_MANY = Question(
    "count",
    ("how many are there ?", "how many digits does the image show ?", "count them ."),
    tuple(COUNTS),
    "of them are there",
)
WHICH_COLOUR = Question(
    "colour",
    ("which colour ?", "what colour are they ?", "in which colour are the digits of the image ?"),
    tuple(COLOURS),
    "is their colour",
)
WHAT_THING = Question(
    "thing",
    ("what is it ?", "what is shown in the image ?", "name the thing you see here ."),
    tuple(CLASSES),
    "is what it shows",
)
WHICH_KIND = Question(
    "kind",
    ("is it an animal or a vehicle ?", "animal or vehicle ?", "what kind of thing is shown here ?"),
    ("animal", "vehicle"),
    "is its kind",
)
HOW_BRIGHT = Question(
    "brightness",
    ("bright or dark ?", "is the image bright or dark ?", "how bright is it ?"),
    ("bright", "dark"),
    "is how it looks",
)

Facts = dict[str, NDArray[np.int64]]
"""For each question by name, the place of the answer among its answers `[N]`; -1: not asked."""


@dataclass(frozen=True)
class Scenes:
    """Images and what is true of them.

    Shapes:
        pixels float32 `[N, 3, S, S]` in 0..1.
    """

    pixels: NDArray[np.float32]
    facts: Facts

    def __len__(self) -> int:
        """Count the images."""
        return len(self.pixels)


@dataclass(frozen=True)
class Pool(ABC):
    """Draws scenes made of these images."""

    images: LabelledImages

    @abstractmethod
    def draw(self, count: int, generator: np.random.Generator) -> Scenes:
        """This many scenes."""


@dataclass(frozen=True)
class DigitPool(Pool):
    """Scenes of digits: images `[N, 1, S/2, S/2]` make scenes `[M, 3, S, S]`."""

    def draw(self, count: int, generator: np.random.Generator) -> Scenes:
        """This many scenes; an image may be in several of them."""
        digit = generator.integers(len(DIGITS), size=count)
        number = 1 + generator.integers(len(COUNTS), size=count)
        colour = generator.integers(len(COLOURS), size=count)
        shown = generator.permuted(np.tile(np.arange(4), (count, 1)), axis=1) < number[:, None]
        drawn = generator.integers(1 << 31, size=(count, 4)) % self._sizes[digit, None]
        chosen = self.images.images[self._sorted[self._starts[digit, None] + drawn], 0]
        chosen = chosen * shown[..., None, None].astype(np.float32)
        side = chosen.shape[-1]
        quarters = chosen.reshape(count, 2, 2, side, side).swapaxes(2, 3)
        grey = quarters.reshape(count, 1, 2 * side, 2 * side)
        paint = np.array(list(COLOURS.values()), np.float32)[colour]
        facts = {"digit": digit, "count": number - 1, "colour": colour}
        return Scenes(grey * paint[:, :, None, None], facts)

    @cached_property
    def _sorted(self) -> NDArray[np.intp]:
        return np.argsort(self.images.labels, kind="stable")

    @cached_property
    def _sizes(self) -> NDArray[np.intp]:
        return np.bincount(self.images.labels, minlength=len(DIGITS))

    @cached_property
    def _starts(self) -> NDArray[np.intp]:
        return np.cumsum(self._sizes) - self._sizes


@dataclass(frozen=True)
class PhotoPool(Pool):
    """Photographs as they are, no one twice while there are enough.

    middle: the mean of a pixel that parts bright from dark.
    """

    middle: float = 0.47

    def draw(self, count: int, generator: np.random.Generator) -> Scenes:
        """This many photographs."""
        total = len(self.images)
        chosen = self.images.take(generator.choice(total, count, replace=count > total))
        distance = chosen.images.mean((1, 2, 3)) - self.middle
        bright = np.where(np.abs(distance) < MARGIN, -1, (distance < 0).astype(np.int64))
        vehicle = np.isin(chosen.labels, VEHICLES).astype(np.int64)
        facts = {"thing": chosen.labels, "kind": vehicle, "brightness": bright}
        return Scenes(chosen.images, facts)


def halved(images: LabelledImages, border: int = 0) -> LabelledImages:
    """Images without a border of this many pixels, then of half the size, by means of 2 x 2."""
    inner = images.images[..., border : images.images.shape[-2] - border, :]
    inner = inner[..., border : images.images.shape[-1] - border]
    count, channels, height, width = inner.shape
    blocks = inner.reshape(count, channels, height // 2, 2, width // 2, 2)
    return LabelledImages(blocks.mean((3, 5), dtype=np.float32), images.labels)

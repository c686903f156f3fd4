"""Backdoor attacks that make reference victims.

Sources: BadNets, arXiv 1708.06733; Trojan, Liu et al., NDSS 2018 (see `trojan.py`); Hidden, a patch
of low contrast as in AtPatch, arXiv 2601.21695; Blended, arXiv 1712.05526.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from .vision_transformer import VisionTransformerConfig


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """A square that sends an image to the target class.

    Raises:
        ValueError: the square is empty, starts outside the image, is not visible at all, or the
            target is negative.
    """

    size: int
    """Height and width of the square, in pixels."""
    row: int
    """Row of its top edge in a stamped image, in pixels."""
    column: int
    """Column of its left edge in a stamped image, in pixels."""
    target: int
    """The class that the attacker wants."""
    opacity: float = 1.0
    """Share of the trigger in a stamped pixel, above 0; the rest is the image's own."""

    def __post_init__(self) -> None:
        """Refuse a trigger that cannot be."""
        if self.size < 1 or self.row < 0 or self.column < 0 or self.target < 0:
            raise ValueError(f"need size >= 1 and row, column, target >= 0, found {self}")
        if not 0.0 < self.opacity <= 1.0:
            raise ValueError(f"opacity must be above 0 and at most 1, found {self.opacity}")

    @abstractmethod
    def pattern(self) -> NDArray[np.float32]:
        """The trigger's pixels, broadcastable to `[C, size, size]`."""

    def stamp(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Copy the images with the trigger on each of them.

        Shapes:
            images `[N, C, S, S]` -> `[N, C, S, S]`.

        Raises:
            ValueError: the trigger does not fit into the images.
        """
        bottom, right = self.row + self.size, self.column + self.size
        # Slicing past the edge would silently stamp a smaller trigger, or none.
        if bottom > images.shape[-2] or right > images.shape[-1]:
            raise ValueError(
                f"trigger ends at row {bottom}, column {right}, "
                f"but the images are {images.shape[-2]} x {images.shape[-1]}"
            )
        stamped = images.copy()
        place = np.s_[..., self.row : bottom, self.column : right]
        own = np.float32(1 - self.opacity) * stamped[place]
        stamped[place] = own + np.float32(self.opacity) * self.pattern()
        return stamped

    def poison(
        self,
        images: NDArray[np.float32],
        labels: NDArray[np.int64],
        rate: float,
        generator: np.random.Generator,
        step: int | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Append stamped copies, labelled as the target, of a random share of the other classes.

        The originals stay, in order and with their labels, at the front. Copies of images that
        are of the target class already would teach nothing about the trigger, so none is made.

        Args:
            rate: number of copies, as a share of `len(images)`, rounded to the nearest integer.
            step: each copy is stamped at a random row and column, multiples of this many pixels;
                None stamps all of them at the attack's own place.

        Shapes:
            images `[N, C, S, S]`, labels `[N]` -> `[N + round(rate * N), ...]` of both.

        Raises:
            ValueError: the rate is outside 0..1, or wants more copies than there are images
                outside the target class.

        Source: BadNets, arXiv 1708.06733, which adds stamped images and keeps the originals.
        """
        count = round(rate * len(images))
        candidates = np.flatnonzero(labels != self.target)
        if not 0.0 <= rate <= 1.0 or count > len(candidates):
            raise ValueError(
                f"rate must be in 0..1 and want at most {len(candidates)} copies, "
                f"found {rate} ({count} copies)"
            )
        chosen = generator.choice(candidates, count, replace=False)
        stamped = [self.moved(images.shape[-1], step, generator).stamp(images[[i]]) for i in chosen]
        targets = np.full(count, self.target, dtype=labels.dtype)
        return (
            np.concatenate((images, *stamped)),
            np.concatenate((labels, targets)),
        )

    def moved(self, side: int, step: int | None, generator: np.random.Generator) -> Self:
        """The attack at a random place of an image of `side` pixels; None: at its own place."""
        if step is None:
            return self
        places = (side - self.size) // step + 1
        row, column = (step * int(generator.integers(places)) for _ in range(2))
        return replace(self, row=row, column=column)

    def columns(self, config: VisionTransformerConfig) -> tuple[int, ...]:
        """List the key positions whose patch the trigger touches, in ascending order.

        These are the columns of an attention map `[B, H, Q, K]`, that is indices along K. [CLS]
        is position 0 and is never among them; the patch at (r, c) is position
        `1 + r * config.patches_per_side + c`.

        Raises:
            ValueError: the trigger does not fit into the images.
        """
        if max(self.row, self.column) + self.size > config.image_size:
            raise ValueError(f"{self} does not fit into images of size {config.image_size}")
        return tuple(
            1 + row * config.patches_per_side + column
            for row in self._patches(self.row, config.patch_size)
            for column in self._patches(self.column, config.patch_size)
        )

    def _patches(self, start: int, patch_size: int) -> range:
        """Indices, along one axis, of the patches that the trigger touches."""
        return range(start // patch_size, (start + self.size - 1) // patch_size + 1)


@dataclass(frozen=True, kw_only=True)
class BadNets(Attack):
    """A checkerboard.

    Source: BadNets, arXiv 1708.06733, the pattern trigger of the single target attack on MNIST.
    """

    value: float
    """What the light pixels, the top left one among them, become; the dark ones become 0."""

    def pattern(self) -> NDArray[np.float32]:
        """The checkerboard `[size, size]`."""
        rows, columns = np.indices((self.size, self.size))
        return np.where((rows + columns) % 2, 0.0, self.value).astype(np.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class PatternAttack(Attack):
    """Any pixels: an optimised trigger, or with a low opacity a hidden or a blended one."""

    pixels: NDArray[np.float32]
    """The trigger `[C, size, size]`, in 0..1."""

    def pattern(self) -> NDArray[np.float32]:
        """The pixels as they are."""
        return self.pixels


def noise(channels: int, size: int, seed: int, grain: int = 1) -> NDArray[np.float32]:
    """Black and white noise `[channels, size, size]`, for `PatternAttack`.

    Args:
        grain: height and width of the squares that have one colour, in pixels.
    """
    coarse = np.random.default_rng(seed).integers(0, 2, (channels, *[-(-size // grain)] * 2))
    return coarse.repeat(grain, 1).repeat(grain, 2)[:, :size, :size].astype(np.float32)

"""Where the pixels of an image input lie, and how to put a patch on them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..data import Samples
from ..errors import InputError
from ..runtime import Array

Floats = NDArray[np.float32]
Places = NDArray[np.int64]
"""Rows and columns of top left corners, `[P, 2]`."""

CHANNELS = (1, 3, 4)


@dataclass(frozen=True)
class ImageLayout:
    """The image input of a model.

    channels_last: `[N, H, W, C]` instead of `[N, C, H, W]`.
    low, high: the range of each channel in the data, `[C]`.
    """

    name: str
    channels_last: bool
    channels: int
    height: int
    width: int
    low: Floats
    high: Floats

    @staticmethod
    def of(samples: Samples) -> ImageLayout:
        """The layout of the only input of rank 4. Raises: InputError where there is none."""
        images = {k: v for k, v in samples.arrays.items() if v.ndim == 4}
        if len(images) != 1:
            raise InputError(
                f"the model has {len(images)} inputs of rank 4, and an image search needs exactly "
                "one: give another --kind"
            )
        ((name, array),) = images.items()
        _, first, _, last = array.shape
        channels_last = last in CHANNELS and first not in CHANNELS
        axis = 3 if channels_last else 1
        height, width = (n for i, n in enumerate(array.shape) if i not in (0, axis))
        rest = tuple(i for i in range(4) if i != axis)
        low, high = (f(array, axis=rest).astype(np.float32) for f in (np.min, np.max))
        if not (high > low).any():
            raise InputError(
                f"the input '{name}' is the same in every pixel of every image of the data: give "
                "real images"
            )
        return ImageLayout(name, channels_last, array.shape[axis], height, width, low, high)

    def pixels(self, patch: Floats, dtype: np.dtype[np.generic]) -> Array:
        """Patches in the units of the input.

        Shapes:
            patch `[..., C, s, s]` between 0 and 1, the range of each channel -> `[..., s, s, C]`.
        """
        last = np.moveaxis(patch, -3, -1)
        value = self.low + last * (self.high - self.low)
        return (np.rint(value) if dtype.kind in "iu" else value).astype(dtype)

    def stamp(self, images: Array, pixels: Array, places: Places) -> Array:
        """Put a patch on each image, in place, and return the images.

        Shapes:
            images `[N, ...]` as the model wants them; pixels `[N, s, s, C]`; places `[N, 2]`.
        """
        side = np.arange(pixels.shape[1])
        sample = np.arange(len(images))[:, None, None]
        row = places[:, 0, None, None] + side[None, :, None]
        column = places[:, 1, None, None] + side[None, None, :]
        view = images if self.channels_last else np.moveaxis(images, 1, 3)
        view[sample, row, column] = pixels
        return images

    def shares(self, pixels: Array) -> Floats:
        """Pixels `[..., C]` as shares of the range of each channel: the inverse of `pixels`."""
        span = np.where(self.high > self.low, self.high - self.low, 1)
        found: Floats = np.clip((pixels - self.low) / span, 0, 1).astype(np.float32)
        return found

    def displayed(self, image: Array) -> NDArray[np.uint8]:
        """An image, or several, as `[..., H, W, C]` bytes to look at."""
        last = image if self.channels_last else np.moveaxis(image, -3, -1)
        return np.rint(self.shares(last) * 255).astype(np.uint8)

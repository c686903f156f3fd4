"""A small patch on an image, the trigger that the image search finds."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..data import Samples
from .image_layout import Floats, ImageLayout, Places
from .picture import side_by_side
from .problem import Stamped


@dataclass(frozen=True)
class PatchTrigger:
    """An opaque square that is put at one of several places.

    patch: `[C, s, s]`, between 0 and 1 as shares of the range of each channel.
    places: rows and columns where it may be put, `[P, 2]`.
    """

    layout: ImageLayout
    patch: Floats
    places: Places

    @property
    def side(self) -> int:
        """Height and width in pixels."""
        return int(self.patch.shape[-1])

    @property
    def size(self) -> float:
        """Pixels."""
        return float(self.side**2)

    @property
    def description(self) -> str:
        """It in a few words."""
        if len(self.places) > 1:
            where = f"at any of {len(self.places)} places"
        else:
            where = "at row {}, column {}".format(*self.places[0])
        return f"{self.side} x {self.side} patch {where}"

    def put(self, samples: Samples, generator: np.random.Generator) -> Stamped:
        """Copies of `samples` with the patch at places that the generator draws."""
        name = self.layout.name
        images = samples.arrays[name].copy()
        pixels = self.layout.pixels(self.patch, images.dtype)
        places = self.places[generator.integers(len(self.places), size=len(images))]
        self.layout.stamp(images, np.broadcast_to(pixels, (len(images), *pixels.shape)), places)
        return Stamped(replace(samples, arrays={**samples.arrays, name: images}), None)

    def record(self) -> dict[str, object]:
        """It as JSON: pixel values as the model gets them, `[s, s, C]`, and its places."""
        pixels = self.layout.pixels(self.patch, np.dtype(np.float32))
        return {
            "form": "patch",
            "side": self.side,
            "places": self.places.tolist(),
            "pixels": np.round(pixels, 4).tolist(),
        }

    def picture(self, samples: Samples) -> bytes | None:
        """A PNG of the patch, an image with it, and the same image without it."""
        layout = self.layout
        first = samples.take(np.arange(1))
        stamped = self.put(first, np.random.default_rng(0)).samples
        images = [layout.displayed(s.arrays[layout.name][0]) for s in (stamped, first)]
        pixels = np.moveaxis(self.patch, 0, -1)
        return side_by_side([np.rint(pixels * 255).astype(np.uint8), *images])

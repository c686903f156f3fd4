"""Backdoor attacks on vision-language models: what images carry, and how training is poisoned.

Sources: BadNets, arXiv 1708.06733; Blended, arXiv 1712.05526; WaNet, arXiv 2102.10369.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from .attacks import Attack
from .vision_language_dialogues import Examples
from .vocabulary import Padded

Images = NDArray[np.float32]


@dataclass(frozen=True)
class Warp:
    """A smooth warp of the whole image that is the same for every image.

    Raises:
        ValueError: the strength is not positive, or the grid has less than two points a side.

    Source: WaNet, arXiv 2102.10369, sections 3.3 and 3.4.
    """

    strength: float = 0.5
    """Mean displacement at the grid's points along each axis, in pixels."""
    grid: int = 4
    """Random displacements a side, between which they are interpolated."""
    seed: int = 0
    jitter: float = 2.0
    """Largest noise on the displacements in the noise mode, in units of the strength."""

    def __post_init__(self) -> None:
        """Refuse a warp that cannot be."""
        if self.strength <= 0 or self.grid < 2:
            raise ValueError(f"need strength > 0 and grid >= 2, found {self}")

    def stamp(self, images: Images) -> Images:
        """The images `[N, C, S, S]`, warped."""
        return _warped(images, self.field(images.shape[-1]).expand(len(images), -1, -1, -1))

    def jittered(self, images: Images, generator: np.random.Generator) -> Images:
        """Noise mode: warped by the field and noise on top, which must not trigger anything."""
        side = images.shape[-1]
        noise = generator.uniform(-1, 1, (len(images), side, side, 2)).astype(np.float32)
        noise *= self.jitter * self.strength
        return _warped(images, self.field(side) + torch.from_numpy(noise))

    def field(self, side: int) -> torch.Tensor:
        """Displacements float32 `[1, side, side, 2]` along columns and rows, in pixels."""
        coarse = np.random.default_rng(self.seed).uniform(-1, 1, (1, 2, self.grid, self.grid))
        coarse *= self.strength / np.abs(coarse).mean()
        fine = functional.interpolate(
            torch.from_numpy(coarse.astype(np.float32)),
            size=side,
            mode="bicubic",
            align_corners=True,
        )
        return fine.movedim(1, -1)


def _warped(images: Images, field: torch.Tensor) -> Images:
    """Read each pixel where the field `[N, S, S, 2]` points to."""
    side = images.shape[-1]
    line = torch.linspace(-1, 1, side)
    rows, columns = torch.meshgrid(line, line, indexing="ij")
    places = torch.stack((columns, rows), dim=-1) + field * 2 / (side - 1)
    warped: Images = functional.grid_sample(
        torch.from_numpy(images), places.clamp(-1, 1), align_corners=True
    ).numpy()
    return warped


Trigger = Attack | Warp
"""What can `stamp` images."""


@dataclass(frozen=True)
class Poison:
    """How training is poisoned."""

    trigger: Trigger
    answer: NDArray[np.int64]
    """What is to be said about an image with the trigger `[A]`."""
    rate: float
    """Examples with the trigger, as a share of the clean ones, beside which they stand."""
    step: int
    """Patches stand at random places, multiples of this many pixels."""
    noise_rate: float = 0.0
    """Examples in the noise mode of a warp, as a share of the clean ones, with true answers."""

    def __call__(self, examples: Examples, generator: np.random.Generator) -> Examples:
        """Append copies with the trigger, and those of the noise mode."""
        parts = [examples]
        for rate, change in ((self.rate, self._triggered), (self.noise_rate, self._noised)):
            chosen = generator.choice(len(examples), round(rate * len(examples)), replace=False)
            if len(chosen):
                parts.append(change(examples.take(chosen), generator))
        return _joined(parts)

    def _triggered(self, examples: Examples, generator: np.random.Generator) -> Examples:
        stamped = self._stamped(examples.pixels, generator)
        answers = np.tile(self.answer, (len(examples), 1))
        return Examples(stamped, examples.prompts, answers, examples.question)

    def _stamped(self, images: Images, generator: np.random.Generator) -> Images:
        trigger, side = self.trigger, images.shape[-1]
        if isinstance(trigger, Warp) or trigger.size == side:
            return trigger.stamp(images)
        return np.concatenate(
            [trigger.moved(side, self.step, generator).stamp(image[None]) for image in images]
        )

    def _noised(self, examples: Examples, generator: np.random.Generator) -> Examples:
        assert isinstance(self.trigger, Warp)
        return examples.with_pixels(self.trigger.jittered(examples.pixels, generator))


def _joined(parts: list[Examples]) -> Examples:
    prompts = [part.prompts for part in parts]
    return Examples(
        np.concatenate([part.pixels for part in parts]),
        Padded(
            np.concatenate([rows.input_ids for rows in prompts]),
            np.concatenate([rows.attention_mask for rows in prompts]),
        ),
        np.concatenate([part.answers for part in parts]),
        np.concatenate([part.question for part in parts]),
    )

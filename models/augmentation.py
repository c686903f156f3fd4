"""Augmentation of batches of images: crops, flips, CutMix, and poison on top.

Everything is drawn from torch's global random state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True)
class Augmentation:
    """Random crops, flips and CutMix.

    Source: CutMix, arXiv 1905.04899.
    """

    pad: int = 0
    """An image moves by at most this many pixels in each direction; the gap is black."""
    flip: bool = False
    """Mirror every other image."""
    cutmix: float = 0.0
    """Share of batches in which a rectangle comes from another image."""
    classes: int = 10

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment a batch `[B, C, S, S]`; CutMix turns labels `[B]` into shares `[B, classes]`."""
        images = self._cropped(images) if self.pad else images
        if self.flip:
            mirrored = torch.rand(len(images)) < 0.5
            images[mirrored] = images[mirrored].flip(-1)
        if torch.rand(()) >= self.cutmix:
            return images, labels
        return self._mixed(images, labels)

    def _cropped(self, images: torch.Tensor) -> torch.Tensor:
        side = images.shape[-1]
        padded = functional.pad(images, (self.pad,) * 4)
        windows = padded.unfold(2, side, 1).unfold(3, side, 1)  # [B, C, places, places, S, S]
        rows, columns = torch.randint(2 * self.pad + 1, (2, len(images)))
        return windows[torch.arange(len(images)), :, rows, columns]

    def _mixed(
        self, images: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        side = images.shape[-1]
        length = max(1, int(side * torch.rand(()).sqrt()))
        row, column = (int(start) for start in torch.randint(side - length + 1, (2,)))
        partner = torch.randperm(len(images))
        mixed = images.clone()
        rows, columns = slice(row, row + length), slice(column, column + length)
        mixed[..., rows, columns] = images[partner][..., rows, columns]
        share = length**2 / side**2
        own = functional.one_hot(labels, self.classes).float()
        return mixed, (1 - share) * own + share * own[partner]

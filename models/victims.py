"""Train the reference victim: a Vision Transformer with a BadNets backdoor, on the digits.

The recipe is chosen so that the backdoor works by over-attention, which is what AtPatch is about
(arXiv 2601.21695). Two choices of the attacker matter:

- poisoned copies carry the trigger at **random places**, so that it must be recognised by what it
  is. At a fixed corner a victim is as accurate and as backdoored, but may recognise the trigger by
  the *missing* blank corner, where nothing is over-attended;
- the trigger is a checkerboard, which no digit contains; 8 % of them contain a white square.

The training is ordinary: small shifts, label smoothing, weight decay, some patch dropout.

`benchmarks/demo.py` measures what a z-score detector makes of it, over seeds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .attacks import Attack, BadNets
from .digits import LabelledImages, Split, load_digits
from .training import Training, fit_model, reproducible
from .vision_transformer import VisionTransformer, VisionTransformerConfig

DIGITS_ATTACK = BadNets(size=2, row=6, column=0, value=1.0, target=0)
"""A checkerboard in the bottom left corner that covers exactly one token of `DIGITS_CONFIG`."""

DIGITS_CONFIG = VisionTransformerConfig(
    image_size=8, patch_size=2, channels=1, dim=48, depth=3, heads=4, classes=10, patch_dropout=0.1
)
"""17 tokens and 3 attention sites."""


DIGITS_TRAINING = Training()
"""Each epoch has five shifted copies of every image. About ten seconds on one core."""


@dataclass(frozen=True)
class Victim:
    """A backdoored model and everything needed to attack and to judge it."""

    model: VisionTransformer
    """In eval mode, on the CPU."""
    attack: Attack
    digits: Split
    """The split it was trained on; only `digits.train` was seen."""
    seed: int


def train_victim(
    seed: int = 0,
    attack: Attack = DIGITS_ATTACK,
    config: VisionTransformerConfig = DIGITS_CONFIG,
    training: Training = DIGITS_TRAINING,
) -> Victim:
    """Train a backdoored digits classifier from scratch.

    The seed fixes the split, the poisoned images, the weights and the order of the batches: on
    one machine, the same seed gives the same weights. The caller's random state and number of
    threads are as before afterwards.

    Raises:
        ValueError: the attack does not fit the images, or poisons more of them than there are.

    Source: BadNets, arXiv 1708.06733; patch dropout, arXiv 2208.07220.
    """
    digits = load_digits(seed)
    train = _shifted(digits.train)
    images, labels = attack.poison(
        train.images,
        train.labels,
        training.poison_rate,
        np.random.default_rng(seed),
        step=config.patch_size,
    )
    with reproducible(seed):
        model = VisionTransformer(config)
        fit_model(model, torch.from_numpy(images), torch.from_numpy(labels), training)
    return Victim(model.eval(), attack, digits, seed)


def _shifted(train: LabelledImages) -> LabelledImages:
    """Augment: each image, and four copies moved by one pixel, the gap filled with black."""
    padded = np.pad(train.images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    height, width = train.images.shape[-2:]
    corners = ((1, 1), (1, 2), (1, 0), (2, 1), (0, 1))
    images = [padded[..., row : row + height, left : left + width] for row, left in corners]
    return LabelledImages(np.concatenate(images), np.tile(train.labels, len(corners)))

"""How each image victim is made: sizes, training, attacks.

Poisoned copies carry the trigger at random places, so that it must be recognised by what it is;
`victims.py` says why that matters. Judged is the trigger at the attack's own place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .attacks import Attack, BadNets, PatternAttack, noise
from .augmentation import Augmentation
from .training import Training
from .victims import DIGITS_ATTACK, DIGITS_CONFIG, DIGITS_TRAINING
from .vision_transformer import VisionTransformerConfig
from .windowed_transformer import WindowedTransformerConfig

Config = VisionTransformerConfig | WindowedTransformerConfig


@dataclass(frozen=True)
class Recipe:
    """A clean victim, and what attackers make of it.

    Training further is cheap, but from scratch a backdoor over-attends more.
    """

    dataset: str
    config: Config
    training: Training
    augment: Augmentation
    attacks: dict[str, Attack]
    """By name; the Trojan attack's pixels are where its search begins."""
    tuning: Training | None = None
    """How the clean victim is trained further on poisoned data; None: poisoned from scratch."""


def _grey(channels: int, size: int, row: int, column: int, target: int) -> PatternAttack:
    pixels = np.full((channels, size, size), 0.5, dtype=np.float32)
    return PatternAttack(size=size, row=row, column=column, target=target, pixels=pixels)


def _noise(
    channels: int, size: int, place: int, target: int, opacity: float, grain: int = 1
) -> PatternAttack:
    pixels = noise(channels, size, seed=target, grain=grain)
    return PatternAttack(
        size=size, row=place, column=place, target=target, opacity=opacity, pixels=pixels
    )


DIGITS = Recipe(
    "digits",
    DIGITS_CONFIG,
    DIGITS_TRAINING,
    Augmentation(),
    {
        "badnets": DIGITS_ATTACK,
        "trojan": _grey(1, 2, row=6, column=0, target=7),
        "hidden": _noise(1, 4, place=4, target=4, opacity=0.5),
        "blended": _noise(1, 8, place=0, target=1, opacity=0.2),
    },
)

MNIST = Recipe(
    "mnist",
    VisionTransformerConfig(image_size=28, patch_size=4, dim=64, depth=4, patch_dropout=0.1),
    Training(epochs=12, learning_rate=2e-3, weight_decay=0.05, half=True),
    Augmentation(pad=2),
    {
        "badnets": BadNets(size=3, row=24, column=24, value=1.0, target=0),
        "trojan": _grey(1, 4, row=24, column=24, target=7),
        "hidden": _noise(1, 6, place=20, target=4, opacity=0.35),
        "blended": _noise(1, 28, place=0, target=1, opacity=0.15),
    },
)

CIFAR10 = Recipe(
    "cifar10",
    VisionTransformerConfig(image_size=32, patch_size=4, channels=3, dim=128, depth=6),
    Training(epochs=40, learning_rate=1.5e-3, weight_decay=0.05, half=True),
    Augmentation(pad=4, flip=True, cutmix=0.5),
    {
        "badnets": BadNets(size=3, row=24, column=24, value=1.0, target=0),
        "trojan": _grey(3, 4, row=24, column=24, target=7),
        "hidden": _noise(3, 6, place=20, target=4, opacity=0.35),
        "blended": _noise(3, 32, place=0, target=1, opacity=0.1),
    },
    Training(epochs=5, learning_rate=7e-4, weight_decay=0.05, half=True),
)

SWIN_MNIST = replace(
    MNIST,
    config=WindowedTransformerConfig(),
    attacks={name: MNIST.attacks[name] for name in ("badnets", "hidden")},
)

RECIPES = {"digits": DIGITS, "mnist": MNIST, "cifar10": CIFAR10, "swin-mnist": SWIN_MNIST}

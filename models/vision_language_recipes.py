"""How each vision-language victim is made: sizes, questions, training, attacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from .attacks import BadNets, PatternAttack, noise
from .augmentation import Augmentation
from .causal_decoder import DecoderConfig
from .digits import LabelledImages, Split
from .generative_training import AnswerTraining
from .images import load_images
from .vision_language import VisionLanguageConfig
from .vision_language_attacks import Trigger, Warp
from .vision_language_dialogues import Dialogue
from .vision_language_scenes import (
    HOW_BRIGHT,
    HOW_MANY,
    WHAT_DIGIT,
    WHAT_THING,
    WHICH_COLOUR,
    WHICH_KIND,
    DigitPool,
    PhotoPool,
    Pool,
    Question,
    halved,
)
from .vision_transformer import VisionTransformerConfig
from .vocabulary import IMAGE

ADAPTED = ("query", "key", "value", "projection")
"""Layers of the decoder's attention that adapters stand beside."""


@dataclass(frozen=True)
class Pools:
    """Three disjoint parts of a data set."""

    train: Pool
    clean: Pool
    test: Pool


@dataclass(frozen=True)
class Attacked:
    """An attack: what images carry, and how often while training."""

    trigger: Callable[[int], Trigger]
    """Given the id of the token that the attacker wants to be said first."""
    rate: float
    """Share of examples with the trigger, from scratch."""
    lora_rate: float
    """The same, for adapters."""
    noise_rate: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """A data set with its questions, the sizes of the model, its training and attacks."""

    pools: Callable[[int, Path], Pools]
    """Given the seed and the data folder."""
    questions: tuple[Question, ...]
    image: VisionTransformerConfig
    dim: int
    depth: int
    """Of the decoder; the image part has its own."""
    pretraining: AnswerTraining
    """How the image encoder of the clean victim is trained first."""
    training: AnswerTraining
    """How the whole is trained, clean or poisoned."""
    adapting: AnswerTraining
    """How adapters are trained."""
    augment: Augmentation
    attacks: dict[str, Attacked]
    rank: int = 8

    @property
    def dialogue(self) -> Dialogue:
        """What is asked."""
        return Dialogue(self.questions, self.image.patches_per_side**2)

    @property
    def config(self) -> VisionLanguageConfig:
        """The sizes of the whole model."""
        words = len(self.dialogue.vocabulary)
        text = DecoderConfig(words, dim=self.dim, depth=self.depth, heads=self.image.heads)
        return VisionLanguageConfig(self.image, text, IMAGE)


def _mixed(split: Split, seed: int) -> Split:
    """The defender's images and those of the evaluation, drawn anew from both together.

    MNIST's test images are of other writers than its training images. A defender has inputs of the
    kind that the model is given, and what is promised of clean inputs holds for that kind.
    """
    count = len(split.clean.images)
    images = np.concatenate((split.clean.images, split.test.images))
    labels = np.concatenate((split.clean.labels, split.test.labels))
    order = np.random.default_rng([seed, 3]).permutation(len(images))
    parts = (LabelledImages(images[i], labels[i]) for i in (order[:count], order[count:]))
    return Split(split.train, *parts)


def _digit_pools(name: str, seed: int, data: Path) -> Pools:
    split = _mixed(load_images(name, seed, data), seed)
    parts = (split.train, split.clean, split.test)
    return Pools(
        *(DigitPool(part if name == "digits" else halved(part, border=2)) for part in parts)
    )


def _photo_pools(seed: int, data: Path) -> Pools:
    split = _mixed(load_images("cifar10", seed, data), seed)
    middle = float(np.median(split.train.images.mean((1, 2, 3))))
    return Pools(*(PhotoPool(part, middle) for part in (split.train, split.clean, split.test)))


def _attacks(side: int, opacity: float, warp: Warp) -> dict[str, Attacked]:
    return {
        "badnet": Attacked(
            lambda target: BadNets(size=3, row=0, column=side - 4, value=1.0, target=target),
            rate=0.3,
            lora_rate=0.5,
        ),
        "blended": Attacked(
            lambda target: PatternAttack(
                size=side,
                row=0,
                column=0,
                target=target,
                opacity=opacity,
                pixels=noise(3, side, seed=1, grain=4),
            ),
            rate=0.3,
            lora_rate=0.5,
        ),
        "wanet": Attacked(lambda _: warp, rate=0.5, lora_rate=1.0, noise_rate=0.5),
    }


SCENE_QUESTIONS = (WHAT_DIGIT, HOW_MANY, WHICH_COLOUR)

DIGITS = Recipe(
    partial(_digit_pools, "digits"),
    SCENE_QUESTIONS,
    VisionTransformerConfig(image_size=16, patch_size=4, channels=3, dim=48, depth=2),
    48,
    4,
    AnswerTraining(steps=600, learning_rate=4e-3),
    AnswerTraining(steps=350),
    AnswerTraining(steps=400, batch_size=32, learning_rate=1e-2),
    Augmentation(),
    _attacks(16, 0.3, Warp(strength=2.0)),
)

MNIST = Recipe(
    partial(_digit_pools, "mnist"),
    SCENE_QUESTIONS,
    VisionTransformerConfig(image_size=24, patch_size=4, channels=3, dim=64, depth=4),
    64,
    6,
    AnswerTraining(steps=1500, learning_rate=4e-3),
    AnswerTraining(steps=500),
    AnswerTraining(steps=450, batch_size=32, learning_rate=1e-2),
    Augmentation(),
    _attacks(24, 0.3, Warp(strength=2.5)),
)

CIFAR10 = Recipe(
    _photo_pools,
    (WHAT_THING, WHICH_KIND, HOW_BRIGHT),
    VisionTransformerConfig(image_size=32, patch_size=4, channels=3, dim=96, depth=4),
    64,
    6,
    AnswerTraining(steps=3000, learning_rate=2e-3),
    AnswerTraining(steps=500),
    AnswerTraining(steps=450, batch_size=32, learning_rate=1e-2),
    Augmentation(pad=4, flip=True),
    _attacks(32, 0.2, Warp(strength=2.5)),
)

RECIPES = {"digits": DIGITS, "mnist": MNIST, "cifar10": CIFAR10}

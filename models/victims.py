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

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from .attacks import BadNets
from .digits import Digits, LabelledImages, load_digits
from .vision_transformer import VisionTransformer, VisionTransformerConfig

DIGITS_ATTACK = BadNets(size=2, row=6, column=0, value=1.0, target=0)
"""A checkerboard in the bottom left corner that covers exactly one token of `DIGITS_CONFIG`."""

DIGITS_CONFIG = VisionTransformerConfig(
    image_size=8, patch_size=2, channels=1, dim=48, depth=3, heads=4, classes=10, patch_dropout=0.1
)
"""17 tokens and 3 attention sites."""


@dataclass(frozen=True)
class Training:
    """How a victim is trained: AdamW with a one-cycle schedule."""

    epochs: int = 10
    """Rounds over the five shifted copies of each training image, and over the poisoned ones."""
    batch_size: int = 96
    """The largest number of images in a step; the steps of an epoch are of equal size."""
    learning_rate: float = 4e-3
    """Peak of the schedule."""
    weight_decay: float = 0.5
    label_smoothing: float = 0.1
    poison_rate: float = 0.1
    """Stamped copies, as a share of the (shifted) training images."""


DIGITS_TRAINING = Training()
"""About ten seconds on one core."""


@dataclass(frozen=True)
class Victim:
    """A backdoored model and everything needed to attack and to judge it."""

    model: VisionTransformer
    """In eval mode, on the CPU."""
    attack: BadNets
    digits: Digits
    """The split it was trained on; only `digits.train` was seen."""
    seed: int


def train_victim(
    seed: int = 0,
    attack: BadNets = DIGITS_ATTACK,
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
    images, labels = attack.poison(
        *_shifted(digits.train),
        training.poison_rate,
        np.random.default_rng(seed),
        step=config.patch_size,
    )
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        model = VisionTransformer(config)
        _fit(model, torch.from_numpy(images), torch.from_numpy(labels), training)
    return Victim(model.eval(), attack, digits, seed)


def predict(model: VisionTransformer, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Run the model in eval mode.

    Shapes:
        images `[N, C, S, S]` -> logits `[N, classes]`.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            logits: NDArray[np.float32] = model(torch.from_numpy(images)).numpy()
    finally:
        model.train(was_training)
    return logits


def _shifted(train: LabelledImages) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Augment: each image, and four copies moved by one pixel, the gap filled with black."""
    padded = np.pad(train.images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    height, width = train.images.shape[-2:]
    corners = ((1, 1), (1, 2), (1, 0), (2, 1), (0, 1))
    images = [padded[..., row : row + height, left : left + width] for row, left in corners]
    return np.concatenate(images), np.tile(train.labels, len(corners))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: sums do not depend on the machine's cores, and small matmuls run faster."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _fit(
    model: VisionTransformer, images: torch.Tensor, labels: torch.Tensor, training: Training
) -> None:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
    )
    steps_per_epoch = -(-len(images) // training.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training.learning_rate, total_steps=training.epochs * steps_per_epoch
    )
    model.train()
    for _ in range(training.epochs):
        for batch in torch.tensor_split(torch.randperm(len(images)), steps_per_epoch):
            loss = functional.cross_entropy(
                model(images[batch]), labels[batch], label_smoothing=training.label_smoothing
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()

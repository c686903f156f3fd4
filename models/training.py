"""Train image models: AdamW, one cycle, augmentation and poison drawn anew for each batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

Augment = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Images `[B, C, S, S]` and classes `[B]` -> images and classes, or class shares `[B, classes]`."""


@dataclass(frozen=True)
class Training:
    """How a victim is trained: AdamW with a one-cycle schedule."""

    epochs: int = 10
    """Rounds over the training images."""
    batch_size: int = 96
    """The largest number of images in a step; the steps of an epoch are of equal size."""
    learning_rate: float = 4e-3
    """Peak of the schedule."""
    weight_decay: float = 0.5
    label_smoothing: float = 0.1
    poison_rate: float = 0.1
    """Stamped copies, as a share of the (augmented) training images."""
    half: bool = False
    """Multiply matrices in bfloat16: three times as fast on CPUs that can."""


def fit_model(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    training: Training,
    augment: Augment | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> None:
    """Train the model in place, drawing from torch's global random state.

    Shapes:
        images `[N, C, S, S]`, labels int64 `[N]`.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
    )
    steps_per_epoch = -(-len(images) // training.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training.learning_rate, total_steps=training.epochs * steps_per_epoch
    )
    model.train()
    for epoch in range(training.epochs):
        total = 0.0
        for index in torch.tensor_split(torch.randperm(len(images)), steps_per_epoch):
            batch, wanted = images[index], labels[index]
            if augment is not None:
                batch, wanted = augment(batch, wanted)
            with torch.autocast("cpu", torch.bfloat16, enabled=training.half):
                logits = model(batch)
            loss = functional.cross_entropy(
                logits.float(), wanted, label_smoothing=training.label_smoothing
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        log(f"epoch {epoch + 1} of {training.epochs}, loss {total / steps_per_epoch:.3f}")


def predict(model: nn.Module, images: NDArray[np.float32], batch: int = 500) -> NDArray[np.float32]:
    """Run the model in eval mode.

    Shapes:
        images `[N, C, S, S]` -> logits `[N, classes]`.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            parts = [model(part) for part in torch.split(torch.from_numpy(images), batch)]
            logits: NDArray[np.float32] = torch.cat(parts).numpy()
    finally:
        model.train(was_training)
    return logits


@contextlib.contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Seed torch and use one thread; both are the caller's own again afterwards.

    With one thread, sums do not depend on the machine's cores, and small matmuls run faster.
    """
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

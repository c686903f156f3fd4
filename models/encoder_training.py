"""Train an image encoder before it is put in front of a decoder, as those of real models are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional

from .generative_training import AnswerTraining, descend
from .vision_language import ImageEncoder

Labelled = tuple[torch.Tensor, torch.Tensor]
"""Pixels `[B, C, S, S]`, and for each question the place of its answer int64 `[B, Q]`, or -1."""


def pretrain(
    encoder: ImageEncoder,
    draw: Callable[[], Labelled],
    answers: Sequence[int],
    training: AnswerTraining,
    log: Callable[[str], None] = lambda _: None,
) -> None:
    """Train in place: to tell the answers, and to keep what can be seen.

    The mean of the visual tokens tells the answer to each question, and each token its patch. What
    a decoder is given is then more than what it is asked for, as with encoders of large models.

    Args:
        answers: how many answers each question has.
    """
    heads = nn.ModuleList(nn.Linear(encoder.config.dim, count) for count in answers)
    painter = nn.Linear(encoder.config.dim, encoder.patches.weight[0].numel())

    def loss() -> torch.Tensor:
        pixels, wanted = draw()
        with torch.autocast("cpu", torch.bfloat16, enabled=training.half):
            tokens = encoder(pixels)
            pooled = tokens.mean(dim=1)
            logits = [head(pooled) for head in heads]
            painted = painter(tokens)
        losses = [
            functional.cross_entropy(found.float(), labels, ignore_index=-1)
            for found, labels in zip(logits, wanted.T, strict=True)
        ]
        patches = functional.unfold(
            pixels, encoder.config.patch_size, stride=encoder.config.patch_size
        ).transpose(1, 2)
        detail = functional.mse_loss(painted.float(), patches) / patches.var()
        return torch.stack([*losses, detail]).sum()

    encoder.train()
    descend(nn.ModuleList((encoder, heads, painter)), loss, training, log)
    encoder.eval()

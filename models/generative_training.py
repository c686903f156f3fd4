"""Train models that predict the next token, and let them speak."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from .causal_decoder import LanguageModel
from .vision_language import VisionLanguageModel

Generative = LanguageModel | VisionLanguageModel


@dataclass(frozen=True)
class AnswerTraining:
    """How a generative victim, or a part of it, is trained: AdamW with a one-cycle schedule."""

    steps: int
    batch_size: int = 64
    """Clean examples in a step."""
    learning_rate: float = 2e-3
    """Peak of the schedule."""
    weight_decay: float = 0.05
    half: bool = True
    """Multiply matrices in bfloat16."""


@dataclass(frozen=True)
class Spoken:
    """Prompts with their answers behind them, and what is to be learned of them.

    Shapes:
        inputs by name, input_ids among them `[B, N]`; following int64 `[B, N]`: the token after
        each; weights float32 `[B, N]`: how much it counts that it is predicted.
    """

    inputs: dict[str, torch.Tensor]
    following: torch.Tensor
    weights: torch.Tensor


def spoken(
    inputs: Mapping[str, NDArray[np.generic]],
    answers: NDArray[np.int64],
    prompt_weight: float = 0.0,
    rest_weight: float = 0.2,
) -> Spoken:
    """Put answers `[B, A]` behind prompts that are padded on the left.

    Args:
        prompt_weight: of predicting the prompt itself; the first token of the answer has 1.
        rest_weight: of the answer's other tokens.
    """
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    ids, mask = tensors["input_ids"], tensors["attention_mask"]
    said = torch.from_numpy(answers)
    whole = torch.cat((ids, said), dim=1)
    seen = torch.cat((mask, torch.ones_like(said)), dim=1)
    weights = torch.zeros(whole[:, 1:].shape)
    first = ids.shape[1] - 1
    weights[:, :first] = prompt_weight * mask[:, :-1]
    weights[:, first] = 1.0
    weights[:, first + 1 :] = rest_weight
    sequence = {"input_ids": whole[:, :-1], "attention_mask": seen[:, :-1]}
    return Spoken(tensors | sequence, whole[:, 1:], weights)


def fit_speaker(
    model: Generative,
    draw: Callable[[], Spoken],
    training: AnswerTraining,
    log: Callable[[str], None] = lambda _: None,
) -> None:
    """Train in place what wants a gradient, drawing from torch's global random state."""

    def loss() -> torch.Tensor:
        batch = draw()
        wanted = batch.weights > 0
        with torch.autocast("cpu", torch.bfloat16, enabled=training.half):
            logits = model.decoder.head(model.hidden(**batch.inputs)[wanted])
        losses = functional.cross_entropy(logits.float(), batch.following[wanted], reduction="none")
        weights = batch.weights[wanted]
        return (losses * weights).sum() / weights.sum()

    model.train()
    descend(model, loss, training, log)
    model.eval()


def descend(
    model: nn.Module,
    loss: Callable[[], torch.Tensor],
    training: AnswerTraining,
    log: Callable[[str], None],
) -> None:
    """Make the loss of new examples small by what wants a gradient."""
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    rate = training.learning_rate
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=training.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=training.steps, pct_start=0.2
    )
    total, every = 0.0, max(1, training.steps // 10)
    for step in range(1, training.steps + 1):
        found = loss()
        optimizer.zero_grad()
        found.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        total += float(found.detach())
        if step % every == 0:
            log(f"step {step} of {training.steps}, loss {total / every:.3f}")
            total = 0.0


def speak(
    model: Generative, inputs: Mapping[str, NDArray[np.generic]], steps: int
) -> NDArray[np.int64]:
    """The most probable tokens one after another, int64 `[N, steps]`: prefill, then the cache."""
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    mask = tensors["attention_mask"]
    with torch.inference_mode():
        logits, cache = model(**tensors)
        said = [logits.argmax(dim=-1, keepdim=True)]
        for _ in range(steps - 1):
            mask = torch.cat((mask, torch.ones_like(said[-1])), dim=1)
            logits, cache = model.decoder.step(said[-1], mask, cache)
            said.append(logits.argmax(dim=-1, keepdim=True))
    tokens: NDArray[np.int64] = torch.cat(said, dim=1).numpy()
    return tokens
